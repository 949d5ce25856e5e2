"""What the cascade and the shortlist save, measured with the strict verifier at work.

`python -m scripts.bench_verification --report-dir bench/results` judges a labelled set of
completions twice, strictly alone and through the cascade, and writes `rl_cascade.json`; then it
lets pools of 32 candidates compete for the same seconds under three ways of verifying and writes
`rl_shortlist.json`. The completions are solutions sent through a noisy channel
(`tests/training/rl/completions.py`), or with `--completions FILE` those that
`scripts/sample_completions.py` or `scripts/rl_coder.py` drew from a real model, of which the pools
of programs compete if there are any; these reports are named `_real`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.soak import code_version, machine_text
from tests.training.rl.completions import model_like, noisy
from training.rl.cascade import VerifierCascade
from training.rl.shortlist import choose, discriminative_scores, recall_at_k
from training.rl.tasks import Task, draw_task
from training.rl.verifier import Verifier

LIMIT_MS = 2500  # what a run has if nobody says otherwise
REPEATS, RESAMPLES = 200, 1000  # draws of a shortlist from each pool; of pools for the interval
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
    """Tasks, texts and mean log-probabilities of rows, each as a list of its own."""
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


@dataclass(slots=True, kw_only=True)
class Found:
    """What one pool gave in one arm: mean over draws of solved (0 or 1), seconds and recall."""

    solved: float
    verify_s: float
    recall: float


def found_by(
    correct: Sequence[bool], seconds: Sequence[float], choices: Sequence[Sequence[int]]
) -> Found:
    """Means over draws, each a choice of a pool's places. Recall is NaN in a pool without a right
    answer."""
    recalls = [recall_at_k(correct, places) for places in choices]
    return Found(
        solved=statistics.fmean(any(correct[n] for n in places) for places in choices),
        verify_s=statistics.fmean(sum(seconds[n] for n in places) for places in choices),
        recall=statistics.fmean(recalls) if any(correct) else math.nan,
    )


def compare_shortlists(
    pools: list[list[Row]],
    calibration: list[Row],
    strict: Verifier,
    *,
    draft_s: float,
    verify_s: float | None = None,
) -> dict[str, Any]:
    """Solved tasks per second when all, some at random, or the best-scored some are verified.

    Verifying is real: every candidate's strict run was timed once; with `verify_s` each is said to
    have taken so long. Drafting costs `draft_s` seconds
    for each of the pool's candidates, the same in every arm. Shortlists are drawn 200 times, so
    that only the pools are a matter of luck.
    """
    cascade = VerifierCascade(strict, audit_share=0.0)
    tasks, texts, log_probs = columns(calibration)
    words = strict.judge(tasks, texts, rng=random.Random(3))
    cascade.calibrate(tasks, texts, words, mean_log_probs=log_probs, rng=random.Random(4))
    rng = random.Random(5)
    arms: dict[str, list[Found]] = {"all": [], "random": [], "score": []}
    for pool in pools:
        tasks, texts, log_probs = columns(pool)
        judged = strict.judge(tasks, texts, rng=random.Random(6))
        correct, seconds = [one.passed for one in judged], [one.elapsed_s for one in judged]
        seconds = seconds if verify_s is None else [verify_s] * len(seconds)
        chances = cascade.p_pass(tasks, texts, mean_log_probs=log_probs)
        scores = discriminative_scores(log_probs, chances, weight=WEIGHT)
        equal = [0.0] * len(pool)
        for name, by, num in (("random", equal, REPEATS), ("score", scores, REPEATS)):
            choices = [choose(by, GROUP, TOPK, rng=rng).verified for _ in range(num)]
            arms[name].append(found_by(correct, seconds, choices))
        arms["all"].append(found_by(correct, seconds, [range(len(pool))]))
    per_pool = draft_s * len(pools[0])
    return {
        "pools": len(pools),
        "pools_with_a_right_answer": round(sum(one.solved for one in arms["all"])),
        "pool_size": len(pools[0]),
        "group": GROUP,
        "topk": TOPK,
        "weight": WEIGHT,
        "calibrated_on": f"{sum(word.passed for word in words)} of {len(words)} pass",
        "draft_seconds_per_candidate": round(draft_s, 5),
        "verify_seconds_per_candidate": "measured" if verify_s is None else verify_s,
        "arms": {name: summary(arm, draft_s=per_pool) for name, arm in arms.items()},
        "score_over_random": ratios(arms["score"], arms["random"], draft_s=per_pool),
        "score_over_all": ratios(arms["score"], arms["all"], draft_s=per_pool),
    }


def rate(arm: Sequence[Found], *, draft_s: float) -> float:
    """Solved tasks per second of verifying and drafting."""
    return sum(one.solved for one in arm) / sum(one.verify_s + draft_s for one in arm)


def summary(arm: Sequence[Found], *, draft_s: float) -> dict[str, Any]:
    """Figures of an arm over its pools, `verify_s` summed; recall only over pools with a right
    answer."""
    recalls = [one.recall for one in arm if not math.isnan(one.recall)]
    error = statistics.stdev(recalls) / len(recalls) ** 0.5 if len(recalls) > 1 else 0.0
    return {
        "solved_share": round(statistics.fmean(one.solved for one in arm), 4),
        "verify_seconds": round(sum(one.verify_s for one in arm), 3),
        "recall": round(statistics.fmean(recalls), 4) if recalls else None,
        "recall_standard_error": round(error, 4),
        "solved_per_second": round(rate(arm, draft_s=draft_s), 4),
        "solved_per_second_of_verifying": round(rate(arm, draft_s=0.0), 4),
    }


def ratios(one: Sequence[Found], other: Sequence[Found], *, draft_s: float) -> dict[str, Any]:
    """Ratio of the two arms' solved tasks per second, with drafting and without; 95 % intervals
    over pools drawn anew (pools without a right answer included)."""
    rng, found = random.Random(7), {}
    for name, draft in (("with_drafting", draft_s), ("verifying_alone", 0.0)):
        ratio = [rate(one, draft_s=draft) / max(rate(other, draft_s=draft), 1e-9)]
        for _ in range(RESAMPLES):
            places = rng.choices(range(len(one)), k=len(one))
            pair = [[arm[place] for place in places] for arm in (one, other)]
            below = rate(pair[1], draft_s=draft)
            if below:
                ratio.append(rate(pair[0], draft_s=draft) / below)
        ranked = sorted(ratio[1:])
        ends = (ranked[len(ranked) // 40], ranked[-1 - len(ranked) // 40])
        found[name] = {
            "ratio": round(ratio[0], 3),
            "interval": [round(end, 3) for end in ends],
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--completions", type=Path, help="of a real model; without it simulated")
    parser.add_argument("--count", type=int, default=600, help="of the labelled set, if simulated")
    parser.add_argument("--pools", type=int, default=24, help="if simulated")
    parser.add_argument("--draft-ms", type=float, default=2.0, help="of one candidate, a model")
    parser.add_argument("--verify-ms", type=float, help="of one candidate, not as it was measured")
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
        every = sampled_pools(options.completions)
        rows = [row for pool in every for row in pool]
        both = [pool for pool in every if pool[0][0].code is not None] or every
        pools, calibration = both[::2], [row for pool in both[1::2] for row in pool]
        options.draft_ms = 1000 * source["seconds"] / len(rows)
    strict = Verifier(code=True, timeout_ms=LIMIT_MS, num_workers=options.workers)
    facts = {"completions": made, "seed": options.seed, "workers": options.workers}
    try:
        reports = {
            "rl_cascade": compare_cascade(rows, strict, audit_share=0.05),
            "rl_shortlist": compare_shortlists(
                pools,
                calibration,
                strict,
                draft_s=options.draft_ms / 1000,
                verify_s=None if options.verify_ms is None else options.verify_ms / 1000,
            ),
        }
    finally:
        strict.close()
    facts |= {"load_average": [round(load, 1) for load in os.getloadavg()]}
    facts |= {"code": code_version(), "machine": machine_text()}
    options.report_dir.mkdir(parents=True, exist_ok=True)
    for name, report in reports.items():
        real = "" if options.completions is None else "_real"
        path = options.report_dir / f"{name}{real}.json"
        path.write_text(json.dumps(facts | report, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
