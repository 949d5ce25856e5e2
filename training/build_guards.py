"""Wiring of the guards that watch a run: sources, manifests, hidden evaluation (see build.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from training.config.cli import write_resolved
from training.config.sigma_config import SigmaConfig
from training.hidden_eval import choose_questions, read_manifest
from training.hidden_process import HiddenEvalProcess, program_command
from training.integrity_guards import IntegrityGuards, SourceGuard
from training.runtime.atomic_io import FileOps
from training.runtime.restore import find_candidates


def build_guards(
    config: SigmaConfig, *, device: torch.device, message: Callable[[str], object]
) -> IntegrityGuards:
    """The guards of a run; a changed program or a bad manifest is refused here."""
    run, integrity = config.run, config.integrity
    output_dir = Path(run.output_dir)
    seeds: dict[str, Any] = {"run": run.seed}
    hidden = sources = None
    if integrity.integrity_hidden_eval_every:
        manifest = read_manifest(integrity.integrity_hidden_eval_manifest)
        choose_questions(manifest, integrity.integrity_hidden_eval_tasks)
        seeds["hidden_eval_commitment"] = manifest.seed_commitment
        hidden = HiddenEvalProcess(
            output_dir,
            command=lambda directory: hidden_eval_command(config, device, directory),
            message=message,
            every=integrity.integrity_hidden_eval_every,
            save_interval=run.save_interval,
            total_steps=run.steps,
        )
    if integrity.integrity_guards_enabled:
        sources = SourceGuard(config, seeds=seeds)
        checkpoints = Path(run.checkpoint_dir)
        resumes = not run.no_resume and checkpoints.is_dir()
        if resumes and find_candidates(FileOps(), checkpoints):
            sources.expect_beginning()
    return IntegrityGuards(config, sources=sources, hidden=hidden, message=message)


def hidden_eval_command(config: SigmaConfig, device: torch.device, directory: Path) -> list[str]:
    """This program once more, answering the hidden questions with the model in `directory`."""
    integrity, precision = config.integrity, config.precision
    return [
        *program_command(),
        "--mode=eval",
        "--hidden",
        "--json",
        "--no-require-cuda",
        f"--device={device}",
        f"--output-dir={config.run.output_dir}",
        f"--checkpoint-dir={directory}",
        f"--precision={precision.precision}",
        *(["--no-amp"] if precision.no_amp else []),
        f"--integrity-hidden-eval-manifest={integrity.integrity_hidden_eval_manifest}",
        f"--integrity-hidden-eval-tasks={integrity.integrity_hidden_eval_tasks}",
    ]


def open_record(config: SigmaConfig, guards: IntegrityGuards, step: int) -> None:
    """Write settings and fingerprints into the run's directory, at the step it begins with.

    Started again when no step is left, a run keeps those that it was trained with.
    """
    home = Path(config.run.output_dir)
    if step < config.run.steps or not (home / "config.json").exists():
        write_resolved(config, home)
        guards.open()
