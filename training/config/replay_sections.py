"""Settings of the replay of completions that passed."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class ReplayConfig:
    replay_capacity: int = flag(
        512, "Completions that replay keeps; 0 = no replay.", minimum=0, maximum=2**16
    )
    replay_inject_every: int = flag(
        2, "Steps between the coins of replay.", minimum=1, maximum=10**6
    )
    causal_replay_enabled: bool = flag(
        False,
        "Train on completions that passed, by randomised coins, and estimate what they are worth.",
    )
    causal_replay_propensity: float = flag(
        0.5, "Chance that a coin replaces row 0 of the batch.", above=0.0, below=1.0
    )
    causal_replay_alpha: float = flag(
        0.20, "How much the estimated worth changes a priority.", minimum=0.0, below=1.0
    )
    causal_replay_ema_beta: float = flag(
        0.95, "Decay of the estimate per window.", minimum=0.0, below=1.0
    )
    causal_replay_novelty_weight: float = flag(
        0.20, "Weight of novelty in the priority.", minimum=0.0, maximum=100.0
    )
    causal_replay_verifier_weight: float = flag(
        0.60, "Weight of the verdict in it, the same for all that passed.",
        minimum=0.0, maximum=100.0,
    )  # fmt: skip
    causal_replay_quality_weight: float = flag(
        0.20, "Weight of the log-prob rank in it.", minimum=0.0, maximum=100.0
    )
    causal_replay_horizon_steps: int = flag(
        6, "Steps over which a coin's outcome is watched.", minimum=1, maximum=10**4
    )
    causal_replay_horizon_decay: float = flag(
        0.90, "Decay per step of what counts in the outcome.", above=0.0, maximum=1.0
    )
    causal_replay_shuffled: bool = flag(
        False, "Placebo: deal the estimated worths out among the clusters."
    )
