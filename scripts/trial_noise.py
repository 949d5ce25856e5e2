"""Measures what trials of overlays decide by: differences of the probe loss between two arms.

A small model trains on the shipped text. Every few steps an arm is forked for each case and undone:
a placebo (the same overlay, other random numbers), and overlays whose verdict is known beforehand:
the learning rate restored from 0.3 of its good value, and rates far above and far below it.

    python scripts/trial_noise.py --json bench/results/trial_noise.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evolution.overlays import Overlay
from evolution.sequential_test import effect_size, mean
from training.build import build_trainer
from training.config.cli import parse_args
from training.fork import ArmEnd, run_arm

MODEL = """
--no-require-cuda --device cpu --tokenizer-name assets-4k --d-model 32 --n-heads 2 --n-layers 1
--mamba-ratio 0 --attention-ratio 1 --mamba-head-dim 16 --kv-latent-dim 16 --rope-dim 8 --d-ff 64
--n-routed-experts 0 --moe-top-k 1 --seq-len 32 --batch-size 4 --dropout 0.1
--instant-mode off --warmup-steps 10 --warmdown-fraction 0.3 --eval-interval 0 --sample-interval 0
--log-interval 1000 --save-interval 100000 --no-strict-feature-usage --integrity-hidden-eval-every 0
--no-integrity-guards-enabled --uroboros-enabled --uroboros-interval 100000
--no-forward-research-loop-enabled --probe-batches 4 --probe-batch-size 16
""".split()
BASES = {  # share of the good rate that the run has: overlays that are tried on it
    "low": (0.3, {"placebo": 1.0, "restored": 1.0 / 0.3}),
    "good": (1.0, {"placebo": 1.0, "far above": 4.0, "far below": 0.25}),
}


def measure_base(
    share: float, cases: dict[str, float], args: argparse.Namespace, directory: Path
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """After every fork, per case: one record per fork, the difference and the control's gain."""
    rate = share * args.lr
    flags = [
        *MODEL,
        *("--lr", str(rate), "--adam-lr", str(rate / 2.0), "--seed", str(args.seed)),
        *("--steps", str(args.steps)),
        *("--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")),
    ]
    trainer = build_trainer(parse_args(flags))
    trials = trainer.services.trials
    assert trials is not None
    trainer.services.recorder.open(metrics_offset=None)
    trainer.features.run("on_setup", trainer.begin_step())
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    while trainer.step + args.horizon <= args.steps:
        begun, arms = trainer.step, {}
        for number, (name, factor) in enumerate(cases.items()):
            trials.overlay = Overlay(lr_factor=factor)
            trials.in_other_arm = True
            arms[name] = run_arm(
                trainer,
                steps=args.horizon,
                score=trials.score,
                seed=1 + begun + number if name == "placebo" else None,
                keep=("uroboros",),
            )
            trials.in_other_arm = False
        while trainer.step < begun + args.horizon:
            trainer.train_step()
            trainer.rows.clear()
        own_end = trials.score(trainer.model)
        for name, arm in arms.items():
            finished = arm.outcome is ArmEnd.FINISHED
            records[name].append(
                {
                    "begun": begun,
                    "difference": own_end - arm.end if finished else None,
                    "control": arm.start - own_end,
                }
            )
        print(f"step {trainer.step}: loss {own_end:.4f}", flush=True)
        yield records
    trainer._close()


def summarise(records: list[dict[str, Any]]) -> dict[str, float]:
    """Effect size and relative gain of one case, and how alike neighbouring differences are."""
    finite = [r["difference"] for r in records if r["difference"] is not None]
    centred = [value - mean(finite) for value in finite]
    power = sum(value * value for value in centred)
    neighbours = sum(one * two for one, two in itertools.pairwise(centred))
    return {
        "replicates": len(records),
        "diverged": len(records) - len(finite),
        "mean": mean(finite),
        "effect_size": effect_size(finite),
        "relative_gain": mean(finite) / mean([abs(record["control"]) for record in records]),
        "share_positive": sum(value > 0.0 for value in finite) / len(records),
        "lag_1_correlation": neighbours / max(power, 1e-12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lr", type=float, default=0.04, help="good learning rate of the model")
    parser.add_argument("--steps", type=int, default=240, help="of each run")
    parser.add_argument("--horizon", type=int, default=12, help="steps per arm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bases", default="low,good", help="which of low and good, by commas")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"settings": {**vars(args), "json": args.json.name}}
    names = args.bases.split(",")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        for name in names:
            share, cases = BASES[name]
            for records in measure_base(share, cases, args, Path(home) / name):
                result[name] = {
                    case: {"summary": summarise(found), "records": found}
                    for case, found in records.items()
                }
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name in names:
        for case, found in result[name].items():
            print(name, case, json.dumps(found["summary"]))


if __name__ == "__main__":
    main()
