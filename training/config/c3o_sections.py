"""Settings of the C3O optimizer, its credit, and the probe text that the credit is measured on."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag

BASES = ("muon", "adam", "soap")
ESTIMATORS = ("first_order", "mask", "exact")


@dataclass(slots=True, kw_only=True)
class C3OConfig:
    base: str = flag(
        "muon", "What C3O scales: muon or soap with AdamW beside it, or a damped Adam.",
        choices=BASES,
    )  # fmt: skip
    beta1: float = flag(0.9, "First-moment decay of the adam base.", minimum=0.0, below=1.0)
    beta2: float = flag(0.98, "Second-moment decay of the adam base.", minimum=0.0, below=1.0)
    eps: float = flag(1e-8, "Epsilon in the adam base's denominator.", above=0.0)
    damping: float = flag(1e-4, "Damping in the adam base's denominator.", minimum=0.0)
    grad_clip: float = flag(1.0, "Element-wise gradient clamp; 0 = off.", minimum=0.0)
    block_size: int = flag(4096, "Elements per credit block.", minimum=1)
    block_scale_min: float = flag(0.60, "Lower bound of a block's factor.", above=0.0, below=1.0)
    block_scale_max: float = flag(1.80, "Upper bound of a block's factor.", above=1.0)
    trust_radius: float = flag(0.15, "Longest step of a tensor / its norm.", above=0.0)
    trust_norm_refresh_steps: int = flag(16, "Steps between parameter norms.", minimum=1)
    trust_norm_refresh_drift: float = flag(
        0.0,
        "Margin to the limit above which a step is not measured until the next refresh; 0 = always "
        "measure.",
        minimum=0.0,
        maximum=1.0,
    )
    foreach_fused: bool = flag(True, "Update tensors in groups; off = one by one, same result.")
    state_dtype: str = flag(
        "auto",
        "Moments: fp32, bf16 (stochastic rounding), or auto = bf16 on CUDA.",
        choices=("auto", "fp32", "bf16"),
    )
    credit_enabled: bool = flag(
        False, "Scale blocks by their counterfactual credit on held-out training text."
    )
    probe_interval: int = flag(8, "Steps between credit probes, the first at step 1.", minimum=1)
    credit_estimator: str = flag(
        "first_order",
        "Credit from one gradient, from random masks, or exact (a forward per block).",
        choices=ESTIMATORS,
    )
    credit_draws: int = flag(8, "Random masks per probe of the estimator mask.", minimum=2)
    credit_ema: float = flag(0.92, "Decay per probe of a block's credit.", minimum=0.0, below=1.0)
    credit_gain: float = flag(0.40, "kappa in factor = exp(kappa z).", minimum=0.0, maximum=10.0)
    credit_clip_value: float = flag(
        2.0, "Clip of the credit z-score and of the logged signal.", above=0.0, maximum=10.0
    )
    credit_skip_threshold: float = flag(
        1e-2, "Spread of the credit below which all factors are 1.", minimum=0.0
    )
    credit_shuffled: bool = flag(False, "Placebo: hand the credits to the wrong blocks.")
    credit_ema_beta: float = flag(
        0.92, "Decay per probe of the centre of the logged signal.", minimum=0.0, below=1.0
    )
    credit_loss_weight: float = flag(0.45, "Weight of the loss gain in the logged signal.")
    credit_speed_weight: float = flag(
        0.20, "Weight of the speed gain in the logged signal; speed never enters a factor."
    )


@dataclass(slots=True, kw_only=True)
class ProbeConfig:
    batch_size: int = flag(2, "Sequences per probe batch.", minimum=1, maximum=2**16)
    batches: int = flag(64, "Probe batches, held out of the training text.", minimum=1)
    held_out: bool = flag(
        False, "Hold the probe text out even if nothing uses it, so that two runs share their data."
    )
