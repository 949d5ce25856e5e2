"""Settings of the trials that change a run while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class UroborosConfig:
    enabled: bool = flag(
        False, "Try other learning rates against a control from the same state; costs a second arm."
    )
    interval: int = flag(10, "Least steps between the beginnings of two replicates.", minimum=1)
    window_size: int = flag(64, "Replicates that the search remembers.", minimum=2, maximum=10**5)
    bo_trials: int = flag(
        8, "Overlays drawn, of which the most promising are tried.", minimum=1, maximum=10**4
    )
    patch_trials: int = flag(3, "Candidates taken from one draw.", minimum=1, maximum=10**4)
    trial_horizon_steps: int = flag(
        12, "Steps per arm; fewer at the end of the run, never below 4.", minimum=4, maximum=10**6
    )
    significance_alpha: float = flag(
        0.05, "Error budget of a run, spent over its candidates.", above=0.0, below=1.0
    )
    min_effect_size: float = flag(
        0.15, "Least mean difference / standard deviation of a promoted overlay.", minimum=0.0
    )
    min_relative_gain: float = flag(
        0.15, "Least mean difference / what the control gained.", minimum=0.0
    )
    patch_commit_enabled: bool = flag(
        True, "Put promoted overlays in force; off = record them only."
    )
    placebo: bool = flag(
        False, "Placebo: candidates change nothing, their arm draws other random numbers."
    )


@dataclass(slots=True, kw_only=True)
class PromotionConfig:
    replacement_policy_strict: bool = flag(
        True, "Promote no overlay whose arms have more gradient spikes than the control's."
    )
    massive_improvement_enforced: bool = flag(
        True, "Ask for the relative gain too; off = significance and effect size only."
    )
    forward_research_loop_enabled: bool = flag(
        True, "Write a pre-registered journal entry per candidate."
    )
