"""Auto-mix against each objective alone, the uniform mix and its placebo, on the copy task.

    python scripts/rl_mix.py --seeds 1 2 3 --output bench/results/rl_mix_cpu.json

All arms start from the same weights and may sample the same number of tokens (igrpo samples two
groups a tick, so it has fewer ticks). The mix is credited with the change of greedy accuracy on
validation prompts per 1,000 sampled tokens; the placebo mix with that of a random earlier tick.
Reported: accuracy on test prompts over the whole run (its mean at equal steps of tokens) and at its
end, the spread of the training reward from tick to tick, and the last weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.bench_common import significant
from scripts.paired import compare
from scripts.rl_copy_task import CopyLearner, CopyTask, copy_model
from scripts.soak import code_version, machine_text
from training.rl.auto_mix import AutoMix

MODES = ("igrpo", "dispo", "gspo", "cispo")
MAIN = "cispo"
ARMS = (*MODES, "uniform", "auto-mix", "auto-mix, placebo")
FLOOR = 0.1
LR = 7e-4
VALIDATION_SEED, TEST_SEED = 1, 2
LOOKS = 20  # at the test prompts, at equal steps of sampled tokens


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=25_600, help="sampled per run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for arm in options.arms:
            runs.append(train(arm, seed=seed, num_tokens=options.tokens))
            print(json.dumps(runs[-1]), flush=True)
            if options.output is not None:
                result = describe(runs, options)
                options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def train(arm: str, *, seed: int, num_tokens: int) -> dict[str, Any]:
    """One run of one arm."""
    started = time.process_time()
    task = CopyTask(num_symbols=6, length=2)
    learner = CopyLearner(copy_model(task, seed=seed), task, lr=LR, seed=seed)
    rng = random.Random(seed)
    mix = AutoMix(MODES, main=MAIN, floor=FLOOR)
    credited = arm.startswith("auto-mix")
    gains: list[float] = []
    rewards: list[float] = []
    curve: list[float] = []
    validation = learner.accuracy(seed=VALIDATION_SEED)
    while learner.num_sampled < num_tokens:
        before = learner.num_sampled
        blend: dict[str, float] = {arm: 1.0}
        if credited:
            blend = mix.blend(mix.draw(rng))
        elif arm == "uniform":
            blend = {mode: 1.0 / len(MODES) for mode in MODES}
        drafts = learner.tick(blend, main=MAIN if MAIN in blend else arm)
        rewards.append(float(drafts.mean()))
        if credited:
            variance = float(drafts.var(correction=0))
            mix.start(mean_reward=rewards[-1], variance=variance, diversity=1.0)
            earlier, validation = validation, learner.accuracy(seed=VALIDATION_SEED)
            gains.append(1000 * (validation - earlier) / (learner.num_sampled - before))
            mix.observe(rng.choice(gains) if arm.endswith("placebo") else gains[-1])
        while len(curve) < LOOKS * learner.num_sampled // num_tokens and len(curve) < LOOKS:
            curve.append(learner.accuracy(seed=TEST_SEED))
    steps = [b - a for a, b in itertools.pairwise(rewards)]
    return {
        "arm": arm,
        "seed": seed,
        "ticks": len(rewards),
        "sampled_tokens": learner.num_sampled,
        "accuracy_mean": significant(statistics.fmean(curve)),
        "accuracy_end": significant(curve[-1]),
        "reward_step_std": significant(statistics.stdev(steps)),
        "weights": {m: significant(w) for m, w in mix.weights().items()} if credited else None,
        "seconds": round(time.process_time() - started, 1),
    }


def describe(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The runs, means per arm, and the mix less every other arm over the seeds both have."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    measures = ("accuracy_mean", "accuracy_end", "reward_step_std", "ticks")
    means = {
        arm: {m: significant(statistics.fmean(run[m] for run in rows.values())) for m in measures}
        for arm, rows in by_arm.items()
    }
    mixed = by_arm.get("auto-mix", {})
    differences = {}
    for arm, rows in by_arm.items():
        seeds = sorted(rows.keys() & mixed.keys())
        if arm != "auto-mix" and len(seeds) > 1:
            errors = [[1.0 - r[s]["accuracy_mean"] for s in seeds] for r in (mixed, rows)]
            differences[arm] = compare(*errors).to_dict()
    return {
        "what": (__doc__ or "").partition("\n")[0],
        "code": code_version(),
        "machine": machine_text(),
        "tokens": options.tokens,
        "lr": LR,
        "floor": FLOOR,
        "means": means,
        "mean_error_of_auto_mix_less_that_of": differences,
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
