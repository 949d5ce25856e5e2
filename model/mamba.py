"""The Mamba-3 block: projections, selective parameters, scan, gated norm, output.

    [z, x, B, C] = in_proj(u)                    ternary;  z, x (H, P), B, C (R, N)
    [dt, A, trap, angle] = control_proj(u)       high precision
    dt = softplus(.)    A = -f(.) <= -1e-4    lambda = sigmoid(.)    theta = pi tanh(.)
    B, C = RMSNorm(.) gain + bias, turned by the running sum of theta
    y_r = scan(x_r, ...)   with x_r = x o rank_in_r
    out = step_scale * out_proj(sum_r rank_out_r o RMSNorm_P(y_r) o silu(z o rank_gate_r))

There is no short convolution: the trapezoid and the biases of B and C take its place.

Decisions. (1) B, C, their biases and the rotation are one group for all heads (see model.ssd).
(2) The angle increment is not multiplied by dt, because dt differs by head: its bias starts as
fixed frequencies, log-spaced from 1 to 1e-3 rad per token, and data can reach +-pi, the flip that
parity needs. (3) The norm's gain and the output's rank projection always multiply each other and
are one parameter, rank_out. The gated norm is also out_proj's SubLN. (4) Rank 1 has no rank_in and
rank_gate: they would scale in_proj's rows a second time. (5) control_proj's matrix starts at zero,
so a new block is a fixed linear system whose steps are log-spaced from 1e-3 to 0.1 over heads.

Source: Mamba-3 2603.15569, read beside the public state-spaces/mamba implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.bitlinear import BitLinear, compute_dtype
from model.config import SigmaModelConfig
from model.norm_rope import biased_norm
from model.opaque import apply_opaque
from model.sequence import SequenceContext
from model.ssd import MambaState, ScanInputs, ScanMasks, mamba_scan, mamba_step

DT_RANGE = (1e-3, 0.1)
FREQUENCY_RANGE = (1e-3, 1.0)  # radians per token
DECAY_FLOOR = 1e-4
DECAY_CEILING = 1e4
_SLAB = 2**16  # numbers with an axis of ranks that are formed at once


class _GatedRankNorm(torch.autograd.Function):
    """sum_r gain_r o y_r / rms(y_r) o silu(z o gate_r), with few passes over y.

    Steps are taken in parts, so that what has an axis of ranks is never formed for all of them.

    y (B, T, H, R, P), any strides; z (B, T, H, P); gain (H, R, P); gate (H, R, P) or None.
    With n = y / rms: dn = g silu gain;  dy = (dn - n mean(dn n)) / rms.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, gain: Tensor, gate: Tensor | None, eps: float
    ) -> Tensor:
        inverse = y.new_empty(*y.shape[:-1], 1)  # (B, T, H, R, 1)
        result = y.new_empty(*y.shape[:3], y.shape[4])
        for part in _parts(y):
            norm = torch.linalg.vector_norm(y[:, part], dim=-1, keepdim=True)
            torch.rsqrt((norm.square_() / y.shape[-1]).add_(eps), out=inverse[:, part])
            gated = F.silu(_gates(z[:, part], gate)) * gain
            gated.mul_(y[:, part]).mul_(inverse[:, part])
            result[:, part] = gated.squeeze(3) if gate is None else gated.sum(3)
        ctx.save_for_backward(y, z, gain, gate, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gain, gate, inverse = ctx.saved_tensors
        grad_y, grad_z = torch.empty_like(y), torch.empty_like(z)
        grad_gain = torch.zeros_like(gain)
        grad_gate = None if gate is None else torch.zeros_like(gate)
        for part in _parts(y):
            gates = _gates(z[:, part], gate)
            grad = grads[0][:, part].unsqueeze(3)
            normed = y[:, part] * inverse[:, part]  # (B, t, H, R, P)
            pulled = grad * normed
            pushed = F.silu(gates).mul_(grad)  # gradient of gain o n
            grad_gain += (pushed * normed).sum((0, 1))
            pushed.mul_(gain)
            dot = (pushed * normed).sum(-1, keepdim=True)
            pushed.addcmul_(normed, dot, value=-1.0 / y.shape[-1])
            torch.mul(pushed, inverse[:, part], out=grad_y[:, part])
            grad_gates = torch.ops.aten.silu_backward(pulled.mul_(gain), gates)
            if gate is None or grad_gate is None:
                grad_z[:, part] = grad_gates.squeeze(3)
                continue
            grad_gate += (grad_gates * z[:, part].unsqueeze(3)).sum((0, 1))
            grad_z[:, part] = grad_gates.mul_(gate).sum(3)
        return grad_y, grad_z, grad_gain, grad_gate, None


def _gates(z: Tensor, gate: Tensor | None) -> Tensor:
    """z (B, T, H, P) for every rank, (B, T, H, R or 1, P)."""
    return z.unsqueeze(3) if gate is None else z.unsqueeze(3) * gate


def _parts(y: Tensor) -> Iterator[slice]:
    """Steps of y (B, T, ...) at most _SLAB numbers at a time: what stays in a core's cache."""
    steps = max(1, _SLAB * y.shape[1] // y.numel())
    for first in range(0, y.shape[1], steps):
        yield slice(first, first + steps)


def decay_rate(value: Tensor) -> Tensor:
    """A = -f(value), f = 1 + v above 0 and 1 / (1 - v) below: smooth, never zero, heavy-tailed.

    Clamped to [-1e4, -1e-4].
    """
    rate = value.clamp_min(0) + (1 - value.clamp_max(0)).reciprocal()
    return -rate.clamp(DECAY_FLOOR, DECAY_CEILING)


class Mamba(nn.Module):
    """Mixer interface of a block: forward(x, context, state=) -> (y, new state)."""

    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.mamba_heads, config.mamba_head_dim
        self.d_inner, self.d_state = config.d_inner, config.mamba_d_state
        self.rank = config.mimo_rank
        self.chunk_len, self.eps = config.mamba_chunk_len, config.norm_eps
        self.backend = "torch"
        self.blocks: tuple[int, int] = (0, 0)  # of a tile: steps, state entries; 0 = by device
        self.num_angles = int(self.d_state * config.mamba_rope_fraction) // 2
        self.trapezoid = config.mamba_trapezoid
        heads, rank, width = self.num_heads, self.rank, self.head_dim
        quantization = {
            "group_size": config.bitlinear_group_size,
            "quant_mode": config.quant_mode,
        }
        self.in_proj = BitLinear(
            config.d_model, 2 * self.d_inner + 2 * rank * self.d_state, **quantization
        )
        self.out_proj = BitLinear(self.d_inner, config.d_model, **quantization)
        self.control_sizes = [heads, heads, heads * self.trapezoid, self.num_angles]
        self.control_proj = nn.Linear(config.d_model, sum(self.control_sizes))
        self.bc_gain = nn.Parameter(torch.ones(2, 1, self.d_state))
        self.bc_bias = nn.Parameter(torch.ones(2, rank, self.d_state))
        self.skip = nn.Parameter(torch.ones(heads))
        self.rank_out = nn.Parameter(torch.full((heads, rank, width), 1.0 / rank))
        self.rank_in: nn.Parameter | None = None
        self.rank_gate: nn.Parameter | None = None
        if rank > 1:
            self.rank_in = nn.Parameter(torch.full((heads, rank, width), 1.0 / rank))
            self.rank_gate = nn.Parameter(torch.ones(heads, rank, width))
        self.step_scale = nn.Parameter(torch.tensor(float(config.mamba_step_scale)))
        self.last_means: Tensor
        # Means of the last training forward: state norm, dt, decay.
        self.register_buffer("last_means", torch.zeros(3), persistent=False)
        self.reset_control()

    @torch.no_grad()
    def reset_control(self) -> None:
        """Set the control projection to its initial values; nothing is random."""
        steps = _log_spaced(DT_RANGE[0], DT_RANGE[1], self.num_heads)
        angles = _log_spaced(FREQUENCY_RANGE[1], FREQUENCY_RANGE[0], self.num_angles)
        bias = torch.zeros(sum(self.control_sizes), dtype=torch.float64)
        bias[: self.num_heads] = steps + torch.log(-torch.expm1(-steps))  # softplus inverse
        bias[bias.numel() - self.num_angles :] = torch.atanh(angles / math.pi)
        self.control_proj.weight.zero_()
        self.control_proj.bias.copy_(bias)

    def forward(
        self, x: Tensor, context: SequenceContext, *, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """x (B, T, D), normalised -> y (B, T, D), already scaled for the residual stream.

        Returns a state that continues the rows if one was given or `context.use_cache` is set.
        """
        inputs, z = self.scan_inputs(x)
        reset, valid = context.reset_mask, context.valid_mask
        in_bf16 = compute_dtype(x) is torch.bfloat16
        with torch.autocast(device_type=x.device.type, enabled=False):
            if state is not None and x.shape[1] == 1:
                y, new_state = mamba_step(inputs, state, reset_mask=reset, valid_mask=valid)
            else:
                y, new_state = mamba_scan(
                    inputs,
                    chunk_len=self.chunk_len,
                    reset_mask=reset,
                    valid_mask=valid,
                    state=state,
                    masks=self._masks(context, inputs.x),
                    backend=self.backend,
                    in_bf16=in_bf16,
                    blocks=self.blocks,
                )
        if self.training and torch.is_grad_enabled():
            self._note(inputs, new_state)
        if self.backend == "triton":
            from model.rank_norm_kernels import gated_rank_norm

            mixed = gated_rank_norm(y, z, self.rank_out, self.rank_gate, eps=self.eps)
        else:
            mixed = apply_opaque(_GatedRankNorm, y, z, self.rank_out, self.rank_gate, self.eps)
        out = self.out_proj(mixed.flatten(2).to(x.dtype)) * self.step_scale
        keep = state is not None or context.use_cache
        return out, new_state if keep else None

    def scan_inputs(self, x: Tensor) -> tuple[ScanInputs, Tensor]:
        """What the scan reads for x (B, T, D), in at least fp32, and the gate z (B, T, H, P)."""
        with torch.autocast(device_type=x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            weight, bias = self.control_proj.weight, self.control_proj.bias
            control = F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
        return self._split_inputs(control, self.in_proj(x).to(dtype))

    def step_mixed(
        self, control: Tensor, projected: Tensor, state: MambaState
    ) -> tuple[Tensor, MambaState]:
        """What out_proj reads, (B, d_inner), after one more token, and the next state.

        control and projected (B, 1, ...): outputs of control_proj and in_proj. Without gradients.
        """
        inputs, z = self._split_inputs(control, projected)
        y, new_state = mamba_step(inputs, state)
        mixed = apply_opaque(_GatedRankNorm, y, z, self.rank_out, self.rank_gate, self.eps)
        return mixed.view(len(mixed), -1), new_state

    def _split_inputs(self, control: Tensor, projected: Tensor) -> tuple[ScanInputs, Tensor]:
        """Outputs (B, T, ...) of the two projections as `scan_inputs` returns them."""
        batch, length, _ = control.shape
        dt, rate, trap, angle = control.split(self.control_sizes, dim=-1)
        dt = F.softplus(dt)
        bc_width = 2 * self.rank * self.d_state
        z, values, bc = projected.split([self.d_inner, self.d_inner, bc_width], dim=-1)
        heads = (batch, length, self.num_heads, self.head_dim)
        bc = bc.reshape(batch, length, 2, self.rank, self.d_state)
        b, c = biased_norm(bc, self.bc_gain, self.bc_bias, eps=self.eps).unbind(2)
        inputs = ScanInputs(
            x=values.view(heads),
            b=b,
            c=c,
            dt=dt,
            log_decay=dt * decay_rate(rate),
            skip=self.skip,
            trap=trap.sigmoid() if self.trapezoid else None,
            theta=math.pi * angle.tanh() if self.num_angles else None,
            rank_in=self.rank_in,
        )
        return inputs, z.view(heads)

    def _masks(self, context: SequenceContext, like: Tensor) -> ScanMasks:
        """Masks of this forward, shared by all Mamba blocks."""
        key = f"mamba_{self.chunk_len}_{like.dtype}_{self.backend}"
        if key not in context.cache:
            context.cache[key] = ScanMasks.create(
                like,
                chunk_len=self.chunk_len,
                reset_mask=context.reset_mask,
                valid_mask=context.valid_mask,
                backend=self.backend,
            )
        return context.cache[key]

    @torch.no_grad()
    def _note(self, inputs: ScanInputs, state: MambaState) -> None:
        """Keep three means on the device; nothing is synchronised."""
        norm = torch.linalg.vector_norm(state.h, dim=(-2, -1)).mean()
        means = (norm, inputs.dt.mean(), inputs.log_decay.exp().mean())
        self.last_means.copy_(torch.stack(means))

    def metrics(self) -> dict[str, float]:
        """Means of the last training forward; synchronises.

        mamba_state_norm: Frobenius norm of a head's state at the end of a row; mamba_dt_mean;
        mamba_decay_mean: mean of exp(dt A), 1 = keeps everything; mamba_chunk_len in tokens.
        """
        norm, dt, decay = self.last_means.tolist()
        return {
            "mamba_state_norm": norm,
            "mamba_dt_mean": dt,
            "mamba_decay_mean": decay,
            "mamba_chunk_len": float(self.chunk_len),
        }


def _log_spaced(first: float, last: float, count: int) -> Tensor:
    """`count` values from `first` to `last`, their geometric mean if there is only one; fp64."""
    if count == 1:
        return torch.tensor([math.sqrt(first * last)], dtype=torch.float64)
    return torch.logspace(math.log10(first), math.log10(last), count, dtype=torch.float64)
