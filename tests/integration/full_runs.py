"""Small runs that together hold every feature but one, each long enough to act; `WHOLE` most.

One run cannot hold them all: the adaptive mixture needs several sources, probes the embedded text.
Left out is fractal_nas: a run begins with the tile that earlier ones found the fastest, so one that
is killed before its first save may begin with another and end with other bits.
"""

import json
from pathlib import Path

import pytest

from tests.integration.chaos import write_texts
from tests.integration.runs import tiny_flags
from tests.training.rl.small_learner import OddBytes
from training.build import build_trainer
from training.config.cli import parse_args
from training.sigma_trainer import SigmaTrainer

SHORT = (
    "--steps", "24", "--save-interval", "3", "--max-checkpoints", "4", "--eval-interval", "12",
    "--sample-interval", "12", "--grad-accum-steps", "1", "--seq-len", "16",
    "--ema-start-fraction", "0.1", "--lr", "0.02", "--adam-lr", "0.01",
)  # fmt: skip
RL = (
    "--ttrl-interval", "2", "--startup-meta-ramp-steps", "0", "--ttrl-max-new-tokens", "3",
    "--ttrl-group-size", "3", "--ttrl-discriminative-topk", "4", "--ttrl-top-k", "0",
    "--verifier-eval-tasks", "4", "--ttrl-refine-iters", "1", "--ttrl-tasks", "2",
    "--ttrl-asym-verify-enabled", "--sigma-rl-auto-mix-enabled",
)  # fmt: skip
HYDRA = (
    "--hydra-enable", "--hydra-domains", "math,text", "--hydra-update-interval", "2",
    "--hydra-rollback-interval", "5", "--hydra-steps-per-phase", "8", "--hydra-gate-tasks", "8",
    "--hydra-lora-lr", "0.01", "--merge-fold-into-backbone",
)  # fmt: skip
TRIALS = (
    "--uroboros-enabled", "--uroboros-interval", "4", "--uroboros-trial-horizon-steps", "4",
)  # fmt: skip
LEFT_OUT = {"fractal_nas"}
WHOLE = "everything on one text"
SETTINGS: dict[str, tuple[str, ...]] = {
    WHOLE: (
        "--optimizer", "c3o", "--c3o-credit-enabled", "--c3o-probe-interval", "3",
        "--c3o-block-size", "512", "--c3o-credit-speed-weight", "0", "--probe-batches", "4",
        "--self-improver-enabled", "--self-improver-interval", "1",
        "--self-evolve-interval", "3", "--self-evolve-history", "4",
        "--causal-replay-enabled", *RL, "--no-verifier-code-enabled", *HYDRA, *TRIALS,
    ),
    "trials beside RL with programs": (
        "--optimizer", "muon", *TRIALS, *RL, "--ttrl-interval", "6",
    ),
    "adaptive mixture": (
        "--optimizer", "soap", "--soap-refresh", "3", "--data-backend", "local", "--num-workers",
        "0", "--near-dedup-window", "0", "--dedup-window-size", "0", "--no-quality-filter",
        "--source-read-timeout-sec", "60",
        "--stream-shuffle-buffer", "8", "--bootstrap-seed-batches", "0", "--batch-size", "4",
        "--aux-enable-adaptive-sources", "--aux-adaptive-interval-tokens", "256",
        "--aux-adaptive-smoothing", "0.5", "--aux-adaptive-signal", "raw",
    ),
}  # fmt: skip


def open_full(name: str, directory: Path, sources: Path) -> SigmaTrainer:
    """The trainer of one of `SETTINGS`; `sources` is a list that `write_sources` made.

    Where RL does not run programs its verifier is one that a model without any skill can please.
    """
    more = ("--source-list", str(sources)) if name == "adaptive mixture" else ()
    with pytest.MonkeyPatch.context() as patch:
        if "--no-verifier-code-enabled" in SETTINGS[name]:
            patch.setattr("training.build_rl.Verifier", OddBytes)
            patch.setattr("training.build_hydra.Verifier", OddBytes)
        return build_trainer(parse_args(tiny_flags(directory, *SHORT, *SETTINGS[name], *more)))


def write_sources(home: Path) -> Path:
    """A list of two folders: one with texts, one that repeats a line and is soon learned."""
    write_texts(home / "texts")
    (home / "lines").mkdir()
    for number in range(90):
        lines = "zero zero zero zero\n" * 40
        (home / "lines" / f"{number}.txt").write_text(f"{number} {lines}", encoding="utf-8")
    path = home / "sources.json"
    entries = [
        {"type": "text", "path": str(home / name), "name": name} for name in ("texts", "lines")
    ]
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path
