"""What the trainer drives besides model, optimizer, stream and features; wired in build.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.audit import RunAudit
from training.hydra_service import HydraService
from training.micro_batch import MicroBatchPlan
from training.micro_pass import MicroPass
from training.overlay_trials import OverlayTrials
from training.probe import Probe
from training.replay.causal_replay import CausalReplay
from training.rl_service import RLService
from training.run_policy import RunPolicy
from training.runtime.checkpoint import CheckpointStore
from training.runtime.clock import PhaseClock
from training.runtime.memory_guard import MemoryGuard
from training.runtime.recorder import RunRecorder
from training.runtime.report_refresh import ReportRefresher
from training.runtime.save_schedule import SaveSchedule
from training.runtime.watchdog import HangWatchdog


@dataclass(slots=True, kw_only=True)
class RunServices:
    """One value per service of a run.

    clock: times the phases of a step. saves: when to save, and what becomes of a save that fails.
    plan: rows per micro-batch; short memory makes it finer. memory, watchdog: asked for relief, and
    told that the run is alive, at every step. audit: guards that watch and never steer. scaler: of
    the loss, which passes apply and the update takes off. evaluate, sample: columns of an
    evaluation, and text the model writes now; None without memory. on_open: called once the
    run directory is locked, with the step that the run begins with (the resolved settings). report:
    refreshed after saves. passes: forward and backward of a micro-batch. probe: held-out training
    text, where a feature decides by it. rl: learner from rewards, if any. replay: of completions
    that passed, if any. trials: of overlays, between steps. hydra: adapters per domain. policy:
    what controllers change.
    """

    clock: PhaseClock
    store: CheckpointStore
    saves: SaveSchedule
    plan: MicroBatchPlan
    memory: MemoryGuard
    watchdog: HangWatchdog
    recorder: RunRecorder
    audit: RunAudit
    scaler: torch.amp.GradScaler
    evaluate: Callable[[nn.Module], dict[str, float | None]]
    sample: Callable[[nn.Module], str | None]
    on_open: Callable[[int], object]
    report: ReportRefresher
    passes: MicroPass
    start_facts: dict[str, Any]
    config_hash: str
    policy: RunPolicy
    probe: Probe | None = None
    rl: RLService | None = None
    replay: CausalReplay | None = None
    trials: OverlayTrials | None = None
    hydra: HydraService | None = None
