"""Learning rate and weight decay as pure functions of the step.

Warm-up, plateau, linear warm-down: one shape with three dials, of which `warmdown_fraction = 1`
is plain linear decay. Weight decay acts in the first half only: late in ternary training it pulls
latent weights across the rounding cut for no gain (BitNet b1.58 2402.17764).
"""

from __future__ import annotations

from training.config.sections import OptimConfig


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    warmdown_fraction: float,
    final_ratio: float,
) -> float:
    """Factor on the peak learning rate of 1-based `step`; ends at `final_ratio`."""
    warmup = min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0
    warmdown_steps = warmdown_fraction * total_steps
    if warmdown_steps <= 0:
        return warmup
    remaining = min(1.0, max(0.0, (total_steps - step) / warmdown_steps))
    return warmup * (final_ratio + (1.0 - final_ratio) * remaining)


def weight_decay_factor(step: int, *, total_steps: int) -> float:
    """1 in the first half of the run, 0 in the second."""
    return 1.0 if step * 2 <= total_steps else 0.0


def step_factors(step: int, *, total_steps: int, optim: OptimConfig) -> tuple[float, float]:
    """Factors on learning rate and weight decay of 1-based `step`, as the flags want them."""
    rate = learning_rate_factor(
        step,
        total_steps=total_steps,
        warmup_steps=optim.warmup_steps,
        warmdown_fraction=optim.warmdown_fraction,
        final_ratio=optim.lr_final_ratio,
    )
    return rate, weight_decay_factor(step, total_steps=total_steps)


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps (0 = never) happens at this one."""
    return interval > 0 and step % interval == 0
