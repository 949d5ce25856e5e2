"""The one orchestrator: owns order and bookkeeping, and no algorithm.

Read `train_step` first; it is the whole program in a page. Everything it calls was wired together
in `training/build.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from training.audit import RunAudit
from training.batch import Batch, BatchStream
from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.evaluation import EvalResult
from training.features.base import FeatureSet
from training.nonfinite import NonFiniteGuard, Verdict
from training.optimizer import OptimizerSet
from training.runtime.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from training.runtime.clock import PhaseClock
from training.runtime.crash_report import write_crash_report
from training.runtime.locks import RunLock
from training.runtime.recorder import RunRecorder
from training.runtime.rng_state import capture_rng_state, restore_rng_state
from training.runtime.signals import StopRequest
from training.runtime.state_tree import join_state, split_state
from training.schedule import learning_rate_factor, weight_decay_factor

REPORT_INTERVAL_S = 30.0
NESTED_GROUPS = ("optimizer", "features", "run")  # the model's state is flat already


@dataclass(slots=True, kw_only=True)
class RunServices:
    """What the trainer drives besides model, optimizer and stream; built in build.py.

    autocast: context of every forward. sample: text the model writes now. on_open: called once the
    run directory is locked (the resolved settings). write_report: called after saves.
    forward_model: the model, or its compiled form. audit: guards that watch and never steer.
    """

    store: CheckpointStore
    recorder: RunRecorder
    audit: RunAudit
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[Any]]
    evaluate: Callable[[nn.Module], EvalResult]
    sample: Callable[[nn.Module], str]
    on_open: Callable[[], object]
    write_report: Callable[[Path], object]
    forward_model: Callable[..., Any]
    start_facts: dict[str, Any]
    config_hash: str


class SigmaTrainer:
    """Trains a model over a stream, step by step, resumable at every step boundary."""

    def __init__(
        self,
        config: SigmaConfig,
        *,
        model: nn.Module,
        optimizer: OptimizerSet,
        stream: BatchStream,
        features: FeatureSet,
        services: RunServices,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.features = features
        self.services = services
        self.device = device
        self.clock = PhaseClock(device)
        self.guard = NonFiniteGuard()
        self.step = 0
        self.output_dir = Path(config.run.output_dir)
        self._reported = time.perf_counter()
        self._parameters = list(optimizer.parameters())

    def fit(self) -> None:
        """Train to the last step, or until asked to stop; every failure leaves a crash JSON."""
        run = self.config.run
        with RunLock(self.output_dir), StopRequest(self.output_dir) as stop:
            try:
                self._open()
                while self.step < run.steps and not stop.requested:
                    ctx = self.train_step()
                    if ctx is not None:
                        self._after_step(ctx, save_now=stop.take_save_request())
                self._finish(interrupted=self.step < run.steps)
            except Exception as error:
                self._report_crash(error)
                raise
            finally:
                self._close()

    def train_step(self) -> StepContext | None:
        """One optimizer step; None when its update had to be skipped."""
        ctx = self.begin_step()
        accumulation = self.config.data.grad_accum_steps
        position = self.stream.position()
        with self.model.weights_held():
            for micro in range(accumulation):
                ctx.micro = micro
                with self.clock("data"):
                    ctx.batch = _moved(self.stream.next_batch(), self.device)
                with self.clock("features"):
                    self.features.run("on_batch", ctx)
                with self.clock("forward"):
                    self.forward(ctx)
                with self.clock("features"):
                    self.features.run("on_losses", ctx)
                with self.clock("backward"):
                    self.services.scaler.scale(ctx.total_loss() / accumulation).backward()
        with self.clock("features"):
            self.features.run("before_optim", ctx)
        if not self.update(ctx, position):
            return None
        with self.clock("features"):
            self.features.run("after_step", ctx)
        self.step = ctx.step
        return ctx

    def begin_step(self) -> StepContext:
        step = self.step + 1
        optim, total = self.config.optim, self.config.run.steps
        factor = learning_rate_factor(
            step,
            total_steps=total,
            warmup_steps=optim.warmup_steps,
            warmdown_fraction=optim.warmdown_fraction,
            final_ratio=optim.lr_final_ratio,
        )
        self.optimizer.set_schedule(
            lr_factor=factor, decay_factor=weight_decay_factor(step, total_steps=total)
        )
        self.clock.reset()
        self.clock.synchronize_edges = self._is_log_step(step)
        ctx = StepContext(
            step=step,
            total_steps=total,
            model=self.model,
            optimizer=self.optimizer,
            mixture=self.stream.mixture,
        )
        ctx.log("lr", optim.lr * factor)
        return ctx

    def forward(self, ctx: StepContext) -> None:
        batch = ctx.batch
        assert batch is not None
        with self.services.autocast():
            ctx.outputs = self.services.forward_model(
                batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels
            )
        ctx.losses = {"lm": ctx.outputs.loss, **ctx.outputs.aux}
        share = ctx.outputs.loss.detach().float() / self.config.data.grad_accum_steps
        ctx.train_loss = share if ctx.train_loss is None else ctx.train_loss + share

    def update(self, ctx: StepContext, position: dict[str, Any]) -> bool:
        """Clip, check and apply the gradients; False when the step must be tried again."""
        scaler = self.services.scaler
        with self.clock("opt_step"):
            for part in self.optimizer.parts:
                scaler.unscale_(part)
            ctx.grad_norm = nn.utils.clip_grad_norm_(
                self._parameters, self.config.optim.grad_clip
            )
            finite = bool(torch.isfinite(ctx.grad_norm) & torch.isfinite(ctx.train_loss))
            overflow = not finite and scaler.is_enabled() and scaler.get_scale() > 1.0
            if finite:
                for part in self.optimizer.parts:
                    scaler.step(part)
                self.model.after_optimizer_step()
            scaler.update()
        with self.clock("zero_grad"):
            self.optimizer.zero_grad()
        if overflow:
            self.model.discard_step()
            return False
        verdict = self.guard.judge(finite=finite, step=ctx.step, position=position)
        if verdict is not Verdict.APPLY:
            self._reject(ctx.step, verdict)
        return verdict is Verdict.APPLY

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run, by state group."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "features": self.features.state_dict(),
            "run": {
                "stream": self.stream.state_dict(),
                "recorder": self.services.recorder.state_dict(),
                "guard": self.guard.state_dict(),
                "audit": self.services.audit.state_dict(),
                "model_metrics": self.model.metrics_state(),
                "scaler": self.services.scaler.state_dict(),
                "rng": capture_rng_state(),
            },
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_position: bool = False) -> None:
        """Restore; `keep_position` leaves stream and records where they are (rollback)."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.features.load_state_dict(state["features"])
        run = state["run"]
        self.services.scaler.load_state_dict(run["scaler"])
        self.model.load_metrics_state(run["model_metrics"])
        restore_rng_state(run["rng"])
        if not keep_position:
            self.stream.load_state_dict(run["stream"])
            self.guard.load_state_dict(run["guard"])
            self.services.recorder.load_state_dict(run["recorder"])

    def save(self, *, block: bool = False) -> None:
        """Checkpoint the finished step; a full disk is reported and training goes on."""
        state = self.state_dict()
        tensors, plain = {"model": state["model"]}, {}
        for name in NESTED_GROUPS:
            tensors[name], plain[name] = split_state(state[name])
        try:
            self.services.store.save(self.step, tensors, plain, block=block)
        except CheckpointError as error:
            if block:
                raise
            self.services.recorder.display.message(f"checkpoint not written: {error}")
            return
        self.services.audit.verify(self.step)
        self._refresh_report(now=block)

    def _refresh_report(self, *, now: bool) -> None:
        """Rebuild report.html, at most twice a minute while the run lasts."""
        if not now and time.perf_counter() - self._reported < REPORT_INTERVAL_S:
            return
        self._reported = time.perf_counter()
        try:
            self.services.write_report(self.output_dir)
        except OSError as error:
            self.services.recorder.display.message(f"report.html not written: {error}")

    def _open(self) -> None:
        recorder, run = self.services.recorder, self.config.run
        checkpoint = None if run.no_resume else self.services.store.load_newest()
        state = None if checkpoint is None else _joined(checkpoint)
        recorder.open(metrics_offset=_metrics_offset(state))
        self.services.on_open()
        self.features.run("on_setup", replace(self.begin_step(), step=self.step))
        if checkpoint is not None and state is not None:
            self.load_state_dict(state)
            self._follow(checkpoint, state)
        recorder.display.start(step=self.step, total_steps=run.steps)
        if self.step:
            recorder.display.message(f"resumed from step {self.step} ({checkpoint.path})")
        facts = {
            **self.services.start_facts,
            "startup_init_s": time.time() - psutil.Process().create_time(),
            "checkpoint_resume_step": self.step,
            "checkpoint_quarantine_count": self.services.store.quarantine_count,
            **self.features.metrics(),
            **self.services.audit.metrics(),
        }
        recorder.write_start_row(self.step, facts)

    def _after_step(self, ctx: StepContext, *, save_now: bool) -> None:
        recorder, run, evaluation = self.services.recorder, self.config.run, self.config.eval
        recorder.observe(ctx)
        self.services.audit.observe(self.step, self.model)
        for message in self.stream.take_messages():
            recorder.display.message(message)
        last = self.step == run.steps
        extra: dict[str, Any] = {"eval_loss": None, "eval_bpb": None}
        if last or _due(self.step, evaluation.eval_interval):
            result = self.services.evaluate(self.model)
            extra = {"eval_loss": result.loss, "eval_bpb": result.bpb}
        if last or _due(self.step, evaluation.sample_interval):
            recorder.write_sample(self.step, self.services.sample(self.model))
        if self._is_log_step(self.step) or extra["eval_bpb"] is not None:
            extra |= {
                **self.model.metrics(),
                **self.features.metrics(),
                **self.services.audit.metrics(),
                **self.stream.metrics(),
                "checkpoint_step": self.services.store.last_saved_step,
                "checkpoint_save_s": self.services.store.last_save_seconds,
                "steps_skipped": len(self.guard.skipped),
            }
            recorder.write_row(ctx, self.clock, extra)
        if save_now or (_due(self.step, run.save_interval) and not last):
            self.save()

    def _finish(self, *, interrupted: bool) -> None:
        display, store = self.services.recorder.display, self.services.store
        try:
            store.wait()
        except CheckpointError as error:
            display.message(f"checkpoint not written: {error}")
        if self.step and store.last_saved_step != self.step:
            self.save(block=True)
        if interrupted:
            display.message(
                f"stopped at step {self.step}, saved; the same command resumes exactly there"
            )
            return
        self.services.audit.judge(self.features.idle_features())
        display.message(f"finished {self.step} steps; results in {self.output_dir}")

    def _reject(self, step: int, verdict: Verdict) -> None:
        display = self.services.recorder.display
        self.model.discard_step()
        if verdict is Verdict.SKIP:
            display.message(f"step {step}: loss or gradient not finite, trying the next batch")
            return
        self.services.store.wait()
        checkpoint = self.services.store.load_newest()
        if checkpoint is None:
            raise RuntimeError(
                f"step {step} is not finite three times in a row and there is no checkpoint to "
                "go back to; lower --lr"
            )
        state = _joined(checkpoint)
        self.load_state_dict(state, keep_position=True)
        self.services.recorder.rewind(state["run"]["recorder"])
        self._follow(checkpoint, state)
        display.message(f"step {step} failed three times: back to step {self.step}, on new data")

    def _follow(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Take over the step of a checkpoint whose state is in place."""
        self.step = checkpoint.step
        audited = state["run"].get("audit", {})
        self.services.audit.load_state_dict(audited, step=self.step, model=self.model)

    def _report_crash(self, error: Exception) -> None:
        recorder = self.services.recorder
        path = None
        if self.config.run.crash_report_enabled:
            path = write_crash_report(
                self.output_dir,
                step=self.step,
                error=error,
                last_metrics=recorder.last_row,
                feature_state=self.features.metrics(),
                config_hash=self.services.config_hash,
            )
        # Also when it is None: the entry tells a failed run from a refused one by this mark.
        error.crash_report = path  # type: ignore[attr-defined]

    def _close(self) -> None:
        self.features.close()
        try:
            self.services.audit.close()
            self.stream.close()
            self.services.store.close()
        finally:
            self.services.recorder.close()

    def _is_log_step(self, step: int) -> bool:
        return step == self.config.run.steps or _due(step, self.config.run.log_interval)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    names = ("input_ids", "labels", "reset_mask", "source_ids")
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    return replace(batch, **moved)


def _metrics_offset(state: dict[str, Any] | None) -> int | None:
    return None if state is None else state["run"]["recorder"]["metrics_offset"]


def _joined(checkpoint: Checkpoint) -> dict[str, Any]:
    state: dict[str, Any] = {"model": checkpoint.tensors["model"]}
    for name in NESTED_GROUPS:
        state[name] = join_state(checkpoint.tensors[name], checkpoint.state[name])
    return state
