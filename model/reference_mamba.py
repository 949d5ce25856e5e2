"""Definition of the Mamba-3 scan: the recurrence itself, one step after another.

    angle_t = angle_{t-1} + theta_t                     turned pairs (i, i + J) of B and C
    h_t     = alpha_t h_{t-1} + beta_t B_{t-1} X_{t-1}^T + gamma_t B_t X_t^T
    y_t     = C_t h_t + skip X_t

with alpha = exp(log_decay), gamma = trap dt, beta = (1 - trap) dt alpha; B_t, C_t (R, N) and
X_t (R, P), so that every step adds a matrix of rank R to the state (N, P) of each head.
Nothing here is fast; the product path is `model.ssd.mamba_scan` and must agree with it on values
and on every gradient. Source: Mamba-3 2603.15569.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.ssd import MambaState, ScanInputs


def turn_pairs_reference(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the pairs (i, i + J) of the first 2 J coordinates of x (B, R, N) by angle (B, J)."""
    num_angles = angle.shape[-1]
    cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
    first, second, rest = x.split([num_angles, num_angles, x.shape[-1] - 2 * num_angles], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """`chosen` in the rows where mask (B,) holds, else `other`."""
    return torch.where(mask.reshape(-1, *[1] * (other.dim() - 1)), chosen, other)


def mamba_scan_reference(
    inputs: ScanInputs,
    *,
    reset_mask: Tensor | None = None,
    valid_mask: Tensor | None = None,
    state: MambaState | None = None,
) -> tuple[Tensor, MambaState]:
    """The recurrence over all T steps; arguments and results as in `model.ssd.mamba_scan`.

    A reset at t zeroes state, previous term and angle before step t. A step that is not valid
    leaves all three as they are; its output means nothing.
    """
    length = inputs.x.shape[1]
    state = MambaState.zeros(inputs) if state is None else state
    h, prev_b, prev_x = state.h, state.prev_b, state.prev_x
    angle = state.angle.double()
    outputs = []
    for t in range(length):
        if reset_mask is not None:
            keep = ~reset_mask[:, t]
            h, prev_b, prev_x, angle = (
                _select(keep, value, torch.zeros_like(value))
                for value in (h, prev_b, prev_x, angle)
            )
        x, b, c = inputs.x[:, t], inputs.b[:, t], inputs.c[:, t]  # (B, H, P), (B, R, N) twice
        turned = angle
        if inputs.theta is not None:
            turned = (angle + inputs.theta[:, t].double()).remainder(2 * math.pi)
            b = turn_pairs_reference(b, turned.to(b.dtype))
            c = turn_pairs_reference(c, turned.to(c.dtype))
        dt, alpha = inputs.dt[:, t], inputs.log_decay[:, t].exp()  # (B, H)
        trap = torch.ones_like(dt) if inputs.trap is None else inputs.trap[:, t]
        beta, gamma = (1 - trap) * dt * alpha, trap * dt
        before = torch.einsum("brn,bhrp->bhnp", prev_b, inputs.expand_rank(prev_x))
        now = torch.einsum("brn,bhrp->bhnp", b, inputs.expand_rank(x))
        new = alpha[..., None, None] * h
        new = new + beta[..., None, None] * before + gamma[..., None, None] * now
        output = torch.einsum("brn,bhnp->bhrp", c, new)
        outputs.append(output + inputs.skip[:, None, None] * inputs.expand_rank(x))
        if valid_mask is None:
            h, prev_b, prev_x, angle = new, b, x, turned
        else:
            valid = valid_mask[:, t]
            h, prev_b = _select(valid, new, h), _select(valid, b, prev_b)
            prev_x, angle = _select(valid, x, prev_x), _select(valid, turned, angle)
    final = MambaState(h=h, prev_b=prev_b, prev_x=prev_x, angle=angle.to(state.angle.dtype))
    return torch.stack(outputs, dim=1), final
