"""Wiring of the trials of overlays (see build.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from evolution.uroboros import SearchSettings, Uroboros
from research.journal import Journal
from training.config.sigma_config import SigmaConfig
from training.overlay_trials import OverlayTrials, TrialSettings
from training.probe import Probe
from training.runtime.atomic_io import FileOps
from training.trial_journal import TrialJournal


def build_trials(
    config: SigmaConfig, probe: Probe | None, *, say: Callable[[str], object]
) -> OverlayTrials | None:
    """What tries overlays in this run; None where nothing does."""
    own, promotion = config.uroboros, config.promotion
    if not own.enabled or probe is None:
        return None
    output_dir = Path(config.run.output_dir)
    search = SearchSettings(
        alpha=own.significance_alpha,
        min_effect=own.min_effect_size,
        min_gain=own.min_relative_gain,
        gain_enforced=promotion.massive_improvement_enforced,
        strict=promotion.replacement_policy_strict,
        window=own.window_size,
        trials=own.bo_trials,
        patches=own.patch_trials,
        # The pace of RL is not drawn: the probe is text, and a dozen steps show no pass rate.
        names=("lr_factor",),
    )
    trials = TrialSettings(
        interval=own.interval,
        steps=own.trial_horizon_steps,
        commit=own.patch_commit_enabled,
        placebo=own.placebo,
    )
    journal = None
    if promotion.forward_research_loop_enabled:
        pages = Journal(output_dir / "research", replace=FileOps().replace)
        journal = TrialJournal(pages)
    return OverlayTrials(
        Uroboros(search), trials, probe=probe, output_dir=output_dir, journal=journal, say=say
    )
