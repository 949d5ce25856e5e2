"""What the cascade and the shortlist save, measured with the strict verifier at work.

`python -m scripts.bench_verification --report-dir bench/results` judges a labelled set of
completions twice, strictly alone and through the cascade, and writes `rl_cascade.json`; then it
lets pools of 32 candidates compete for the same seconds under three ways of verifying and writes
`rl_shortlist.json`. The completions are solutions sent through a noisy channel
(`tests/training/rl/completions.py`), or with `--completions FILE` those that
`scripts/sample_completions.py` drew from a real pretrained model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from scripts.soak import code_version, machine_text
from tests.training.rl.completions import model_like, noisy
from training.rl.cascade import VerifierCascade
from training.rl.shortlist import choose, discriminative_scores, recall_at_k
from training.rl.tasks import Task, draw_task
from training.rl.verifier import Judgement, Verifier

LIMIT_MS = 30_000
POOL, GROUP, TOPK, WEIGHT = 32, 5, 8, 0.35
Row = tuple[Task, str, float]


def sampled_pools(path: Path) -> list[list[Row]]:
    """Pools of a real model, each of one task."""
    pools = []
    for item in json.loads(path.read_text(encoding="utf-8"))["items"]:
        rng = random.Random(item["task_seed"])
        task = draw_task(item["family"], level=item["level"], rng=rng)
        pools.append([(task, row["text"], row["mean_log_prob"]) for row in item["pool"]])
    return pools


def drawn_pools(num: int, rng: random.Random) -> list[list[Row]]:
    """Pools of one task each: one candidate in six is unharmed, the others are noisy."""
    pools = []
    for number in range(num):
        family, level = (("function", 1), ("function", 2), ("expression", 4))[number % 3]
        task, pool = draw_task(family, level=level, rng=rng), []
        for _ in range(POOL):
            noise = 0.0 if rng.random() < 1 / 6 else rng.choice((0.05, 0.15, 0.3))
            text = noisy(task.solution, noise=noise, rng=rng)
            pool.append((task, text, -0.2 - 4 * noise + rng.gauss(0, 0.4)))
        pools.append(pool)
    return pools


def columns(rows: list[Row]) -> tuple[list[Task], list[str], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def by_domain(tasks: list[Task], seconds: list[float]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for task, one in zip(tasks, seconds):
        kind = "code" if task.code is not None else task.family
        totals[kind] = totals.get(kind, 0.0) + one
    return {kind: round(total, 4) for kind, total in sorted(totals.items())}


def compare_cascade(rows: list[Row], strict: Verifier, *, audit_share: float) -> dict[str, Any]:
    """The same completions strictly and in stages; seconds are those of the verdicts themselves."""
    tasks, texts, log_probs = columns(rows)
    strict.judge(tasks[:40], texts[:40], rng=random.Random(0))  # processes started
    words = strict.judge(tasks, texts, rng=random.Random(1))
    cascade = VerifierCascade(strict, audit_share=audit_share)
    begun = time.perf_counter()
    found = cascade.verify(tasks, texts, rng=random.Random(2), mean_log_probs=log_probs)
    wall = time.perf_counter() - begun
    metrics = cascade.take_metrics()
    alone, staged = (sum(one.elapsed_s for one in part) for part in (words, found))
    accepts = [place for place, word in enumerate(words) if word.passed]
    stages: dict[str, int] = {}
    for one in found:
        name = f"{one.stage} {'accepts' if one.passed else 'rejects'}"
        stages[name] = stages.get(name, 0) + 1
    strict_only = [
        word.elapsed_s if one.stage == "strict" else 0.0 for word, one in zip(words, found)
    ]
    return {
        "completions": len(rows),
        "accepted_strictly": len(accepts),
        "audit_share": audit_share,
        "false_accepts": sum(one.passed and not word.passed for one, word in zip(found, words)),
        "agreement_on_accepts": sum(found[place].passed for place in accepts) / len(accepts),
        "stages": dict(sorted(stages.items())),
        "strict_calls": metrics["verifier_cascade_strict_calls"],
        "audit_disagreement": metrics["verifier_cascade_audit_disagreement"],
        "verdict_seconds_strict_only": round(alone, 3),
        "verdict_seconds_cascade": round(staged, 3),
        "saved_fraction": round(1 - staged / alone, 4),
        "saved_fraction_by_strict_run_that_was_avoided": round(1 - sum(strict_only) / alone, 4),
        "seconds_strict_only_by_kind": by_domain(tasks, [word.elapsed_s for word in words]),
        "seconds_cascade_by_kind": by_domain(tasks, [one.elapsed_s for one in found]),
        "wall_seconds_cascade": round(wall, 3),
    }


def rows_of_gate(words: list[Judgement]) -> str:
    return f"{sum(word.passed for word in words)} of {len(words)} pass"


def compare_shortlists(
    pools: list[list[Row]], calibration: list[Row], strict: Verifier, *, draft_s: float
) -> dict[str, Any]:
    """Solved tasks per second when all, some at random, or the best-scored some are verified.

    Verifying is real: every candidate's strict run was timed. Drafting is a model of its cost:
    `draft_s` seconds for each of the pool's candidates, the same in every arm.
    """
    cascade = VerifierCascade(strict, audit_share=0.0)
    tasks, texts, log_probs = columns(calibration)
    words = strict.judge(tasks, texts, rng=random.Random(3))
    cascade.calibrate(tasks, texts, words, mean_log_probs=log_probs, rng=random.Random(4))
    rng = random.Random(5)
    arms = {
        name: {"solved": 0, "verify_s": 0.0, "recalls": []} for name in ("all", "random", "score")
    }
    for pool in pools:
        tasks, texts, log_probs = columns(pool)
        judged = strict.judge(tasks, texts, rng=random.Random(6))
        correct = [one.passed for one in judged]
        chances = cascade.p_pass(tasks, texts, mean_log_probs=log_probs)
        scores = discriminative_scores(log_probs, chances, weight=WEIGHT)
        chosen = {
            "all": list(range(len(pool))),
            "random": choose([0.0] * len(pool), GROUP, TOPK, rng=rng).verified,
            "score": choose(scores, GROUP, TOPK, rng=rng).verified,
        }
        for name, places in chosen.items():
            arms[name]["solved"] += any(correct[place] for place in places)
            arms[name]["verify_s"] += sum(judged[place].elapsed_s for place in places)
            if any(correct):
                arms[name]["recalls"].append(recall_at_k(correct, places))
    draft = draft_s * sum(len(pool) for pool in pools)
    return {
        "pools": len(pools),
        "pool_size": len(pools[0]),
        "group": GROUP,
        "topk": TOPK,
        "weight": WEIGHT,
        "calibrated_on": rows_of_gate(words),
        "draft_seconds_per_candidate": draft_s,
        "arms": {name: summary(arm, pools=len(pools), draft=draft) for name, arm in arms.items()},
    }


def summary(arm: dict[str, Any], *, pools: int, draft: float) -> dict[str, Any]:
    recalls = arm["recalls"]
    error = statistics.stdev(recalls) / len(recalls) ** 0.5 if len(recalls) > 1 else 0.0
    return {
        "solved_share": round(arm["solved"] / pools, 4),
        "verify_seconds": round(arm["verify_s"], 3),
        "recall": round(statistics.fmean(recalls), 4) if recalls else None,
        "recall_standard_error": round(error, 4),
        "solved_per_second": round(arm["solved"] / (arm["verify_s"] + draft), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--completions", type=Path, help="of a real model; without it simulated")
    parser.add_argument("--count", type=int, default=600, help="of the labelled set, if simulated")
    parser.add_argument("--pools", type=int, default=24, help="if simulated")
    parser.add_argument("--draft-ms", type=float, default=2.0, help="of one candidate, a model")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-dir", type=Path, required=True)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    if options.completions is None:
        made = "solutions through a noisy channel (tests/training/rl/completions.py)"
        rows = list(model_like(count=options.count, rng=rng))
        pools = drawn_pools(options.pools, rng)
        calibration = [row for pool in drawn_pools(options.pools // 3, rng) for row in pool]
    else:
        source = json.loads(options.completions.read_text(encoding="utf-8"))
        made = {name: value for name, value in source.items() if name != "items"}
        both = sampled_pools(options.completions)
        rows, pools = [row for pool in both for row in pool], both[::2]
        calibration = [row for pool in both[1::2] for row in pool]
    strict = Verifier(code=True, timeout_ms=LIMIT_MS, num_workers=options.workers)
    facts = {"completions": made, "seed": options.seed, "workers": options.workers}
    try:
        reports = {
            "rl_cascade": compare_cascade(rows, strict, audit_share=0.05),
            "rl_shortlist": compare_shortlists(
                pools, calibration, strict, draft_s=options.draft_ms / 1000
            ),
        }
    finally:
        strict.close()
    facts |= {"load_average": [round(load, 1) for load in os.getloadavg()]}
    facts |= {"code": code_version(), "machine": machine_text()}
    options.report_dir.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        path = options.report_dir / f"{name}.json"
        path.write_text(json.dumps(facts | report, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
