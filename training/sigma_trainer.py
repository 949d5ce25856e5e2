"""The one orchestrator: owns order and bookkeeping, and no algorithm.

Read `train_step` first; it is the whole program in a page. Everything it calls was wired together
in `training/build.py`.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import FeatureSet
from training.micro_batch import StepRows, move_batch
from training.nonfinite import NonFiniteGuard, Verdict, state_is_finite
from training.optimizer import OptimizerSet
from training.run_policy import LR
from training.run_services import RunServices
from training.runtime.checkpoint import Checkpoint
from training.runtime.crash_report import write_crash_report
from training.runtime.locks import RunLock
from training.runtime.memory_guard import (
    MemoryLimitReached,
    Relief,
    clear_caches,
    is_out_of_memory,
)
from training.runtime.reported_run import Closable, ReportedRun
from training.runtime.rng_state import capture_rng_state, restore_rng_state
from training.runtime.run_state import join_run_state
from training.runtime.signals import StopRequest
from training.schedule import is_due, step_factors
from training.stream.batch import BatchStream, closed_on_error
from training.weight_update import apply_gradients


class SigmaTrainer:
    """Trains a model over a stream, step by step, resumable at every step boundary."""

    def __init__(
        self,
        config: SigmaConfig,
        *,
        model: Any,  # a SigmaLLM, which this module must not know
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
        self.rows = StepRows(stream)
        self.features = features
        self.services = services
        self.device = device
        self.clock = services.clock
        self.guard = NonFiniteGuard()
        self.plan = services.plan
        self.step = 0
        self.output_dir = Path(config.run.output_dir)
        self._updating = False

    def fit(self) -> None:
        """Train to the last step, or until asked to stop; every failure leaves a crash JSON."""
        run = self.config.run
        with (
            closed_on_error(self.stream),  # of a run whose directory is another's, say
            RunLock(self.output_dir),
            closing(self.services.store.open()),  # not at the first save, after hours
            StopRequest(self.output_dir) as stop,
            self.services.watchdog as watchdog,
            ReportedRun(self._parts(), report=self._report_crash),
        ):
            self._open()
            while self.step < run.steps and not stop.requested:
                trials = self.services.trials
                if trials and not trials.between_steps(self, lambda: stop.requested):
                    continue
                ctx = self.attempt_step()
                if ctx is not None:
                    self._after_step(ctx, save_now=stop.take_save_request())
                    self._relieve_memory()
                watchdog.beat(self.step)
            self._finish(interrupted=self.step < run.steps)

    def attempt_step(self) -> StepContext | None:
        """`train_step`, or None after a step without memory: it is replayed with less at once."""
        self._updating = False
        before = (capture_rng_state(), self.features.remember())
        try:
            ctx = self.train_step()
            self.rows.clear()
            return ctx
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.plan.can_halve:
                error.add_note("one row per micro-batch is too much: lower --seq-len or --d-model")
                raise
        # Only here are the failed step's tensors free: the traceback held them.
        self._replay_smaller(*before)
        return None

    def train_step(self) -> StepContext | None:
        """One optimizer step; None when its update had to be skipped."""
        ctx = self.begin_step()
        accumulation = self.plan.num_micro_batches
        position = self.rows.position()
        with self.model.weights_held():
            for micro in range(accumulation):
                ctx.micro = micro
                with self.clock("data"):
                    ctx.batch = move_batch(self.rows.take(self.plan.rows), self.device)
                with self.clock("features"):
                    self.features.run("on_batch", ctx)
                with self.clock("forward"):
                    self.forward(ctx)
                with self.clock("features"):
                    self.features.run("on_losses", ctx)
                with self.clock("backward"):
                    self.services.passes.backward(ctx.total_loss, parts=accumulation)
        with self.clock("features"):
            self.features.run("before_optim", ctx)
        if not self.update(ctx, position):
            return None
        with self.clock("features"):
            self.features.run("after_step", ctx)
        self.step = ctx.step
        return ctx

    def begin_step(self) -> StepContext:
        """Context of the step after `self.step`, with this step's learning rates set on the
        optimizer."""
        step = self.step + 1
        optim, total = self.config.optim, self.config.run.steps
        factor, decay = step_factors(step, total_steps=total, optim=optim)
        factor *= self.services.policy.multiplier(LR)
        self.optimizer.set_schedule(lr_factor=factor, decay_factor=decay)
        self.clock.reset()
        self.clock.synchronize_edges = self._is_log_step(step)
        ctx = StepContext(step=step, total_steps=total, model=self.model, optimizer=self.optimizer)
        ctx.mixture, ctx.probe = self.stream.mixture, self.services.probe
        ctx.rl, ctx.replay = self.services.rl, self.services.replay
        ctx.trials, ctx.hydra = self.services.trials, self.services.hydra
        ctx.policy, ctx.span = self.services.policy, self.clock
        ctx.log("lr", optim.lr * factor)
        return ctx

    def forward(self, ctx: StepContext) -> None:
        assert ctx.batch is not None
        parts = self.plan.num_micro_batches
        ctx.outputs = self.services.passes.forward(ctx.batch, micro=ctx.micro, parts=parts)
        ctx.losses, ctx.weights = {"lm": ctx.outputs.loss, **ctx.outputs.aux}, {}
        share = ctx.outputs.loss.detach().float() / parts
        ctx.train_loss = share if ctx.train_loss is None else ctx.train_loss + share

    def update(self, ctx: StepContext, position: dict[str, Any]) -> bool:
        """Clip, check and apply the gradients; False when the step must be tried again."""
        assert ctx.train_loss is not None
        self._updating = True
        with self.clock("opt_step"):
            outcome = apply_gradients(
                self.model,
                self.optimizer,
                scaler=self.services.scaler,
                max_norm=self.config.optim.grad_clip,
                loss=ctx.train_loss,
            )
            ctx.grad_norm = outcome.grad_norm
        with self.clock("zero_grad"):
            self.optimizer.zero_grad()
        if outcome.overflow:
            self.model.discard_step()
            return False
        if outcome.sound:
            verdict = self.guard.judge(finite=outcome.finite, step=ctx.step, position=position)
        else:
            verdict = self.guard.judge_state(finite=False, step=ctx.step)
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
                "micro_batch": self.plan.state_dict(),
                "model_metrics": self.model.metrics_state(),
                "scaler": self.services.scaler.state_dict(),
                "rng": capture_rng_state(),
                "policy": self.services.policy.state_dict(),
            },
        }

    def load_state_dict(self, state: dict[str, Any], *, keep_position: bool = False) -> None:
        """Restore; `keep_position` leaves stream and records where they are (rollback)."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.features.load_state_dict(state["features"])
        run = state["run"]
        self.services.scaler.load_state_dict(run["scaler"])
        self.plan.load_state_dict(run["micro_batch"])
        self.model.load_metrics_state(run["model_metrics"])
        restore_rng_state(run["rng"])
        if "policy" in run:  # not in checkpoints of earlier versions
            self.services.policy.load_state_dict(run["policy"])
        if not keep_position:
            self.stream.load_state_dict(run["stream"])
            self.guard.load_state_dict(run["guard"])
            self.services.recorder.load_state_dict(run["recorder"])

    def save(self, *, block: bool = False) -> None:
        """Checkpoint the finished step; CheckpointError with `block`, else it is tried again."""
        if self.services.saves.save(self.step, self.state_dict(), block=block):
            self.services.audit.verify(self.step)
            self.services.report.refresh(self.output_dir, at_once=block)

    def _open(self) -> None:
        recorder, run, store = self.services.recorder, self.config.run, self.services.store
        checkpoint = store.start_anew() if run.no_resume else store.load_newest()
        state = None if checkpoint is None else join_run_state(checkpoint)
        offset = None if state is None else state["run"]["recorder"]["metrics_offset"]
        begun = checkpoint.step if checkpoint else 0
        recorder.open(metrics_offset=offset, step=begun)
        self.services.on_open(begun)
        self.features.run("on_setup", replace(self.begin_step(), step=self.step))
        if checkpoint is not None and state is not None:
            self.load_state_dict(state)
            self._follow(checkpoint, state)
        recorder.display.start(step=self.step, total_steps=run.steps)
        if checkpoint is not None:
            more = "" if begun < run.steps else "; a larger --steps trains on"
            recorder.display.message(f"resumed from step {begun} ({checkpoint.path}){more}")
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
        last = self.step == run.steps
        saving = self.services.saves.is_due(self.step, requested=save_now) or last
        if saving and not state_is_finite(self.model, self.optimizer):
            self._reject(self.step, self.guard.judge_state(finite=False, step=self.step))
            return
        self.clock.finish_step()
        recorder.observe(ctx)
        self.services.audit.observe(self.step, self.model)
        for message in self.stream.take_messages():
            recorder.display.message(message)
        extra: dict[str, Any] = {"eval_loss": None, "eval_bpb": None}
        if last or is_due(self.step, evaluation.eval_interval):
            extra |= self.services.evaluate(self.model)
        if last or is_due(self.step, evaluation.sample_interval):
            recorder.write_sample(self.step, self.services.sample(self.model))
        if self._is_log_step(self.step) or extra["eval_bpb"] is not None:
            extra |= self._gather_metrics()
            recorder.write_row(ctx, self.clock, extra)
        if saving and not last:
            self.save()

    def _gather_metrics(self) -> dict[str, Any]:
        return {
            **self.model.metrics(),
            **self.optimizer.metrics(),
            **self.features.metrics(),
            **self.services.audit.metrics(),
            **self.stream.metrics(),
            **self.services.passes.metrics(),
            "checkpoint_step": self.services.store.last_saved_step,
            "checkpoint_save_s": self.services.store.last_save_seconds,
            "steps_skipped": len(self.guard.skipped),
            "micro_batch_rows": self.plan.rows,
            "memory_guard_stage": int(self.services.memory.stage),
        }

    def _finish(self, *, interrupted: bool) -> None:
        display, store = self.services.recorder.display, self.services.store
        self.services.saves.settle()
        if self.step and store.last_saved_step != self.step:
            self._save_last()
        if interrupted:
            anew = " without --no-resume" if self.config.run.no_resume else ""
            saved = store.last_saved_step
            told = f"at step {saved}, saved; the same command{anew} resumes exactly there"
            display.message(f"stopped {told if saved is not None else 'before anything was saved'}")
            return
        self.services.audit.judge(self.features.idle_features())
        display.message(f"finished {self.step} steps; results in {self.output_dir}")

    def _reject(self, step: int, verdict: Verdict) -> None:
        display = self.services.recorder.display
        self.model.discard_step()
        if verdict is Verdict.SKIP:
            display.message(f"step {step}: loss or gradient not finite, trying the next batch")
            return
        restored = verdict is Verdict.RESTORE
        self._go_back(f"step {step} is not finite", keep_position=not restored)
        data = "the same data: the weights were not finite" if restored else "new data"
        display.message(f"step {step} failed: back to step {self.step}, on {data}")

    def _replay_smaller(self, rng: dict[str, Any], features: list[Any]) -> None:
        """Undo the step that found no memory, so that it comes again with half the rows."""
        step, split = self.step + 1, 2 * self.plan.split
        self.optimizer.zero_grad()
        self.model.discard_step()
        self.services.passes.forget()
        clear_caches()
        if self._updating:
            # Weights or moments may be half way: only a checkpoint knows them as they were.
            if self.services.scaler.is_enabled():
                self.services.scaler.update(self.services.scaler.get_scale())
            self.rows.clear()
            self._go_back(f"step {step} ran out of memory in its update", keep_position=False)
        else:
            self.rows.rewind()
            restore_rng_state(rng)
            self.features.rewind(features)
        self.plan.split = split
        self.services.recorder.display.message(
            f"step {step}: out of memory; on from step {self.step + 1} with {self.plan.rows} rows"
        )

    def _go_back(self, why: str, *, keep_position: bool) -> None:
        """Return to the newest checkpoint; RuntimeError if there is none."""
        self.services.saves.settle()
        checkpoint = self.services.store.load_newest()
        if checkpoint is None:
            raise RuntimeError(
                f"{why} and there is no checkpoint to go back to; lower --lr if it was not "
                "finite, --batch-size if memory ran out"
            )
        state = join_run_state(checkpoint)
        self.load_state_dict(state, keep_position=keep_position)
        self.services.recorder.rewind(state["run"]["recorder"], step=checkpoint.step)
        self._follow(checkpoint, state)

    def _relieve_memory(self) -> None:
        relief = self.services.memory.check()
        if relief is Relief.SMALLER_MICRO_BATCH:
            self.plan.halve()
        elif relief is Relief.SAVE_AND_STOP:
            self.services.saves.settle()
            self._save_last()
            raise MemoryLimitReached(self.services.store.last_saved_step)

    def _save_last(self) -> None:
        """Save before the process ends, unless only an older checkpoint is worth keeping."""
        if state_is_finite(self.model, self.optimizer):
            self.services.saves.save_last(lambda: self.save(block=True))

    def _follow(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Take over the step of a checkpoint whose state is in place."""
        self.step = checkpoint.step
        audited = state["run"].get("audit", {})
        self.services.audit.load_state_dict(audited, step=self.step, model=self.model)

    def _report_crash(self, error: Exception) -> Path | None:
        if not self.config.run.crash_report_enabled:
            return None
        return write_crash_report(
            self.output_dir,
            step=self.step,
            error=error,
            last_metrics=self.services.recorder.last_row,
            feature_state=self.features.metrics_after_failure(),
            config_hash=self.services.config_hash,
        )

    def _parts(self) -> tuple[Closable, ...]:
        """What is closed at the end of a run, in this order."""
        own = self.services
        return self.features, self.clock, own.audit, self.stream, own.saves, own.recorder

    def _is_log_step(self, step: int) -> bool:
        return step == self.config.run.steps or is_due(step, self.config.run.log_interval)
