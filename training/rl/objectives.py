"""Policy-gradient objectives over groups of completions: GRPO, GSPO, CISPO, DISPO.

With rho = pi / pi_old of a token, A the advantage of its completion, y_i the i-th of N completions:

    grpo   -1/N sum_i 1/|y_i| sum_t min(rho A, clip(rho) A)
    gspo   -1/N sum_i min(s A, clip(s) A),  s = exp(1/|y_i| sum_t log rho)
    cispo  -1/sum|y| sum_i sum_t sg(clip(rho)) A log pi
    dispo  as cispo, with bounds of its own for A > 0 and for A < 0

igrpo is grpo on completions of draft-conditioned prompts (training/rl/igrpo.py). While pi = pi_old
all are REINFORCE: grpo and gspo give every completion the same weight, cispo and dispo every token,
which is one gradient where lengths are equal. grpo and gspo take the gradient from what the clip
has cut off; cispo and dispo keep it with a bounded weight.

All sums run over completion tokens alone. A group without variance has advantages of exactly zero.
log rho is bounded by 20, so that zero times an overflow cannot make a NaN.

Sources: GRPO 2402.03300, GSPO 2507.18071, CISPO 2506.13585, DISPO 2602.00983; k3: Schulman 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("grpo", "igrpo", "gspo", "cispo", "dispo")
MAX_LOG_RATIO = 20.0


@dataclass(slots=True, kw_only=True, frozen=True)
class ClipSettings:
    """How far a ratio may count: [1 - down, 1 + up].

    eps: both widths of grpo and cispo; gspo_eps: of gspo, 0 = eps (ratios of whole completions vary
    less); dispo: down and up for completions with A > 0, then down and up for A < 0.
    """

    eps: float = 0.2
    gspo_eps: float = 0.0
    dispo: tuple[float, float, float, float] = (0.2, 0.4, 0.2, 0.2)

    def validate(self) -> ClipSettings:
        """ValueError names the flag and the mend."""
        for flag, value in (("clip-eps", self.eps), ("gspo-clip-eps", self.gspo_eps)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"--sigma-rl-{flag} must lie in [0, 1)")
        if self.eps == 0.0:
            raise ValueError("--sigma-rl-clip-eps must be positive")
        if min(self.dispo) < 0.0 or max(self.dispo[0], self.dispo[2]) > 1.0:
            raise ValueError(
                "--sigma-rl-dispo-clip must be four widths >= 0: down (at most 1), up, down, up"
            )
        return self

    def bounds(self, mode: str, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest ratio that counts, each of the shape of `advantages`."""
        if mode == "dispo":
            down, up, down_wrong, up_wrong = self.dispo
            right = advantages > 0
            low = torch.full_like(advantages, 1.0 - down_wrong).masked_fill(right, 1.0 - down)
            return low, torch.full_like(advantages, 1.0 + up_wrong).masked_fill(right, 1.0 + up)
        eps = self.gspo_eps or self.eps if mode == "gspo" else self.eps
        return torch.full_like(advantages, 1.0 - eps), torch.full_like(advantages, 1.0 + eps)


@dataclass(slots=True, kw_only=True)
class PolicyTerm:
    """loss: 0-d, with gradient. ratio_mean, clip_fraction: 0-d, unread, of tokens (gspo: of
    completions); clipped are those with an advantage whose weight the bounds have changed.
    """

    loss: Tensor
    ratio_mean: Tensor
    clip_fraction: Tensor


def group_advantages(rewards: Tensor, *, normalise: bool) -> Tensor:
    """Advantages (groups, G) of rewards (groups, G): r - mean, over std + 1e-6 if `normalise`.

    std is that of the group itself (division by G). Equal rewards give exactly 0.
    """
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = rewards - rewards.mean(1, keepdim=True)
    if normalise:
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    # The mean of equal numbers is rounded, and what is left would be divided by 1e-6.
    varied = rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)
    return torch.where(varied, centred, 0.0)


def policy_loss(
    mode: str,
    *,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: ClipSettings,
    scored: Tensor | None = None,
) -> PolicyTerm:
    """The objective `mode` of MODES, to be minimised.

    log_probs, old_log_probs (N, C) at temperature 1; advantages (N,); mask (N, C) bool. scored:
    the log-probabilities that cispo and dispo differentiate, if other than log_probs
    (--sigma-rl-dispo-logit-temp); the ratio stays one of temperature 1.
    """
    if mode not in MODES:
        raise ValueError(f"--sigma-rl-mode is {mode!r}; choose one of {', '.join(MODES)}")
    advantages = advantages.to(log_probs.dtype)
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0)
    if mode == "gspo":
        log_ratio = sequence_mean(log_ratio, mask)
    else:
        advantages = advantages.unsqueeze(1).expand_as(log_probs)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = clip.bounds(mode, advantages)
    counted = mask.any(1) if mode == "gspo" else mask
    if mode in ("cispo", "dispo"):
        weight = ratio.detach().clamp(low, high) * advantages
        target = log_probs if scored is None else scored
        loss = -token_mean(weight * target.masked_fill(~mask, 0.0), mask)
        changed = (ratio < low) | (ratio > high)
    else:
        gain = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        loss = -gain.mean() if mode == "gspo" else -sequence_mean(gain, mask).mean()
        changed = ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))
    changed = changed & counted & (advantages != 0)
    total = counted.sum().clamp_min(1)
    return PolicyTerm(
        loss=loss,
        ratio_mean=(ratio.detach() * counted).sum() / total,
        clip_fraction=changed.sum() / total,
    )


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """0-d mean over tokens of exp(d) - d - 1, d = log pi_ref - log pi: never negative, low noise.

    Estimates KL(pi || pi_ref) on tokens that pi has sampled.
    """
    d = (reference_log_probs - log_probs).masked_fill(~mask, 0.0)
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return token_mean(d.exp() - d - 1.0, mask)


def entropy_bonus(entropy: Tensor, mask: Tensor) -> Tensor:
    """0-d mean entropy over tokens in nats, to be subtracted from a loss."""
    return token_mean(entropy, mask)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (N, C) over all tokens of the mask; 0 if there are none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp_min(1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(N,): mean of values (N, C) over each row's tokens; 0 where it has none."""
    return values.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp_min(1)
