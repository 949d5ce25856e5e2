"""Settings of what moves the learning rate while a run trains: a rule, and a search."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class SelfEvolveConfig:
    interval: int = flag(0, "Steps between looks of the rule at the probe; 0 = no rule.", minimum=0)
    history: int = flag(
        24, "Probe values that the rule looks at, and waits for.", minimum=4, maximum=10**4
    )
    lr_up: float = flag(
        1.03, "Factor on the learning rate when the probe loss falls.", minimum=1.0, maximum=2.0
    )
    lr_down: float = flag(
        0.94, "Factor when it rises or a gradient spikes.", above=0.0, maximum=1.0
    )
    lr_min_factor: float = flag(
        0.50, "Lower bound of all factors on the learning rate.", above=0.0, maximum=1.0
    )
    lr_max_factor: float = flag(
        1.80, "Upper bound of all factors on the learning rate.", minimum=1.0, maximum=100.0
    )
    ttrl_interval_min: int = flag(
        2, "Lower bound of the RL interval, whatever turns it.", minimum=1, maximum=10**6
    )
    ttrl_interval_max: int = flag(
        16, "Upper bound of the RL interval, whatever turns it.", minimum=1, maximum=10**6
    )
    target_reserved_gb: float = flag(
        10.5, "Reserved GPU memory in GiB above which RL gets rarer and shorter.", above=0.0
    )
    shuffled: bool = flag(False, "Placebo: put the probe values in a random order.")


@dataclass(slots=True, kw_only=True)
class SelfImproverConfig:
    enabled: bool = flag(
        False, "Search for a better learning rate by small changes, tried both ways on the probe."
    )
    interval: int = flag(2, "Steps per trial; four make a comparison.", minimum=1, maximum=10**6)
    mutation_sigma: float = flag(0.25, "Size of a change at first.", above=0.0, maximum=1.0)
    adaptive_sigma_enabled: bool = flag(
        True, "Adapt the size to how often a comparison agrees with those before it."
    )
    sigma_ema_beta: float = flag(0.90, "Decay of that rate.", minimum=0.0, below=1.0)
    sigma_gain_up: float = flag(
        1.06, "Factor on the size while more than 0.7 agree.", minimum=1.0, maximum=10.0
    )
    sigma_gain_down: float = flag(0.94, "Factor on it otherwise.", above=0.0, maximum=1.0)
    sigma_min: float = flag(0.02, "Lower bound of the size.", above=0.0, maximum=1.0)
    sigma_max: float = flag(0.30, "Upper bound of the size.", above=0.0, maximum=1.0)
    shuffled: bool = flag(False, "Placebo: hand the scores to the trials at random.")
