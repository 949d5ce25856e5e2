"""Measures what trials of overlays decide by: real differences between two arms of small runs.

Each run tries one overlay whose verdict is known beforehand over and over and puts nothing in
force: a placebo (the same overlay, other random numbers), the learning rate restored from 0.3 of
its value, and rates far above and far below. What was recorded feeds the simulations of
tests/evolution/test_uroboros.py.

    python scripts/trial_noise.py --json bench/results/trial_noise.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from evolution.e_process import effect_size, mean
from evolution.overlays import Overlay
from evolution.uroboros import Uroboros
from training.build import build_trainer
from training.config.cli import parse_args

MODEL = """
--no-require-cuda --device cpu --tokenizer-name assets-4k --d-model 16 --n-heads 2 --n-layers 1
--mamba-ratio 0 --attention-ratio 1 --mamba-head-dim 16 --kv-latent-dim 8 --rope-dim 4 --d-ff 16
--n-routed-experts 0 --moe-top-k 1 --seq-len 16 --batch-size 4 --dropout 0.1 --instant-mode off
--warmup-steps 2 --warmdown-fraction 0 --eval-interval 0 --eval-tokens 64 --sample-interval 0
--sample-tokens 1 --log-interval 1000 --save-interval 100000 --no-strict-feature-usage
--integrity-hidden-eval-every 0 --no-integrity-guards-enabled --uroboros-enabled
--no-uroboros-patch-commit-enabled --no-forward-research-loop-enabled --probe-batches 4
--probe-batch-size 16
""".split()
CASES: dict[str, tuple[float, float, tuple[str, ...]]] = {  # rate of the run, factor, more flags
    "placebo": (1.0, 2.0, ("--uroboros-placebo",)),
    "restored": (0.3, 1.0 / 0.3, ()),
    "far above": (4.0, 4.0, ()),
    "far below": (1.0, 0.25, ()),
}


class PlantedSearch(Uroboros):
    """Always tries the same overlay."""

    planted = Overlay()

    def _next_candidate(self, rng: random.Random) -> Overlay:
        return self.planted


def run_case(case: str, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """The rows that one run recorded."""
    share, factor, more = CASES[case]
    rate = share * args.lr
    flags = [
        *MODEL, *more,
        *("--lr", str(rate), "--adam-lr", str(rate / 2.5), "--seed", str(args.seed)),
        *("--steps", str(args.steps), "--uroboros-interval", str(args.horizon)),
        *("--uroboros-trial-horizon-steps", str(args.horizon)),
        *("--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")),
    ]  # fmt: skip
    trainer = build_trainer(parse_args(flags))
    trials = trainer.services.trials
    assert trials is not None
    search = PlantedSearch(trials.search.settings)
    search.planted = Overlay(lr_factor=factor)
    trials.search = search
    trainer.fit()
    path = directory / "uroboros_patch_history.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of the replicates, what they amount to, and what the search decided on the way."""
    replicates = [row for row in rows if row["event"] == "replicate"]
    values = [row["difference"] for row in replicates]
    moved = mean([abs(row["control"]) for row in replicates])
    kept = ("step", "difference", "control", "spikes")
    return {
        "replicates": len(values),
        "diverged": sum(row["event"] == "dropped" for row in rows),
        "effect_size": effect_size(values),
        "relative_gain": mean(values) / moved if moved else 0.0,
        "decisions": [
            [row["step"], row["decision"]] for row in replicates if row["decision"] != "continue"
        ],
        "records": [{name: row[name] for name in kept} for row in replicates],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lr", type=float, default=0.05, help="good learning rate of the model")
    parser.add_argument("--steps", type=int, default=132, help="of each run")
    parser.add_argument("--horizon", type=int, default=4, help="steps per arm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", default=",".join(CASES), help="by commas")
    parser.add_argument("--json", type=Path, required=True, help="added to what it holds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for case in args.cases.split(","):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
            found = summarise(run_case(case, args, Path(home) / "run"))
        result: dict[str, Any] = {}
        if args.json.is_file():
            result = json.loads(args.json.read_text(encoding="utf-8"))
        settings = {"lr": args.lr, "steps": args.steps, "horizon": args.horizon, "seed": args.seed}
        result[case] = {**settings, **found}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        told = {name: value for name, value in found.items() if name != "records"}
        print(case, json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
