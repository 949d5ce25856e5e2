"""Does reinforcement learning learn? Arms that start from one small model, and their placebos.

    python scripts/rl_learns.py --json bench/results/rl_learns_cpu.json --work runs/rl_learns

A model of each seed reads the text of scripts/rl_text.py; then every arm goes on from it on
training tasks and is examined on held-out ones, which no arm has seen (their prompts are in the
text, with its slips). `verifier` is rewarded by verdicts and shown no solution; `permuted` gets the
same rewards on the wrong completions of a group, `random` gets drawn ones; `sft` is shown solutions
for as much processor time as `verifier` took. `majority` is rewarded by the vote of its own samples
and `majority_random` by drawn rewards, all else alike; `more_` are the same from a model that read
more, whose majority is right more often. The arms `misled_` and `torn_` start from models whose
majority is wrong, often by a clear vote and seldom so: `_abstain` may abstain, `_forced` takes
every vote for a label, and `_random` is their placebo. `_cautious` abstains from labels with less
than 0.7 of the votes, the others from less than half.

The file is written after every arm, and an arm that it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from model.sigma_llm import SigmaLLM
from scripts.bench_common import cpu_name, load_average
from scripts.paired import compare
from scripts.rl_text import (
    FAMILIES,
    MISLED,
    MORE,
    TORN,
    FixedLevels,
    byte_tokenizer,
    examine,
    held_out_tasks,
    pretrained,
    solution_rows,
)
from training.optim.adamw import AdamW
from training.probe import evaluating
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.learner import Learner, LearnerSettings
from training.rl.objectives import ClipSettings
from training.rl.policy_update import BETAS, PolicyUpdate, UpdateSettings
from training.rl.verifier import Verifier
from training.tokenizer import Tokenizer

WHAT = "Does reinforcement learning learn? Arms from one small model, and their placebos."
TICKS, TASKS, LR, KL = 80, 64, 6e-4, 0.02
VOTED_TICKS, VOTED_LR, VOTED_KL = 60, 3e-4, 0.5  # votes err: shorter steps, on a leash
SAMPLING = CandidateSettings(group_size=8, max_new_tokens=6, temperature=0.8, top_k=40)
# 32 votes, of which the policy learns from 8.
VOTING = replace(SAMPLING, label_mode="majority", asym=True, pool_multiplier=4.0, topk=8)


@dataclass(slots=True, kw_only=True, frozen=True)
class Arm:
    """What is learned from which rewards; without settings, from solutions."""

    settings: CandidateSettings | None = SAMPLING
    tasks: int = TASKS
    ticks: int = TICKS
    lr: float = LR
    kl: float = KL
    further: str | None = None  # text that its model reads first

    @property
    def start(self) -> str:
        """Name of the scores of the model that it goes on from."""
        return f"{self.further}_start" if self.further else "start"


VOTED = Arm(settings=VOTING, lr=VOTED_LR, kl=VOTED_KL, ticks=VOTED_TICKS)
FORCED = replace(VOTED, settings=replace(VOTING, majority_min_share=0.0))
CAUTIOUS = replace(VOTED, settings=replace(VOTING, majority_min_share=0.7))
DRAWN = replace(VOTED, settings=replace(SAMPLING, placebo="random"))
ARMS = {
    "verifier": Arm(),
    "permuted": Arm(settings=replace(SAMPLING, placebo="permuted")),
    "sft": Arm(settings=None),
    "random": Arm(settings=replace(SAMPLING, placebo="random")),
    "majority": VOTED,
    "majority_random": DRAWN,
    "more_majority": replace(VOTED, further=MORE),
    "more_cautious": replace(CAUTIOUS, further=MORE),
    "more_random": replace(DRAWN, further=MORE),
    "misled_abstain": replace(VOTED, further=MISLED),
    "misled_cautious": replace(CAUTIOUS, further=MISLED),
    "misled_forced": replace(FORCED, further=MISLED),
    "torn_abstain": replace(VOTED, further=TORN),
    "torn_forced": replace(FORCED, further=TORN),
    "torn_random": replace(DRAWN, further=TORN),
}


def reinforce(
    model: SigmaLLM, tokenizer: Tokenizer, arm: Arm, *, seed: int
) -> list[dict[str, float]]:
    """The arm's ticks of RL; the columns of every tenth."""
    assert arm.settings is not None
    learner = Learner(
        LearnerSettings(mode="cispo", tasks=arm.tasks, budget_max=1, eval_every=0),
        maker=CandidateMaker(model, tokenizer, Verifier(code=False, timeout_ms=2500), arm.settings),
        update=PolicyUpdate(
            model,
            UpdateSettings(
                main="cispo", clip=ClipSettings(), lr=arm.lr, entropy_weight=0.001, kl_weight=arm.kl
            ),
        ),
        sampler=FixedLevels(FAMILIES, seed=seed),
        val_sampler=FixedLevels(FAMILIES, split="val", seed=seed),
    )
    curve = []
    for tick in range(arm.ticks):
        metrics = learner.tick(seed=1000 * seed + tick).metrics
        if (tick + 1) % 10 == 0:
            curve.append(
                {
                    name: round(metrics[name], 4)
                    for name in (
                        "ttrl_raw_reward_mean", "ttrl_reward_mean", "ttrl_abstain_rate",
                        "ttrl_label_accuracy", "sigma_rl_entropy", "sigma_rl_kl",
                        "sigma_rl_policy_grad_norm",
                    )
                    if metrics[name] == metrics[name]
                }
            )  # fmt: skip
    learner.close()
    return curve


def supervise(model: SigmaLLM, tokenizer: Tokenizer, *, seconds: float, seed: int) -> int:
    """Supervised steps on solutions for that much processor time; how many they were."""
    sampler = FixedLevels(FAMILIES, seed=seed)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0)
    started, steps = time.process_time(), 0
    while time.process_time() - started < seconds:
        inputs, labels = solution_rows(tokenizer, [sampler.draw() for _ in range(TASKS)])
        with evaluating(model):
            output = model(inputs, labels=labels)
        assert output.loss is not None
        output.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def scores_of(model: SigmaLLM, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        family: examine(model, tokenizer, held_out_tasks(family), SAMPLING).to_dict()
        for family in FAMILIES
    }


def run_arm(
    arm: str, model: SigmaLLM, tokenizer: Tokenizer, *, seed: int, budget_s: float
) -> dict[str, Any]:
    """Train the model as the arm says, and examine it."""
    own = ARMS[arm]
    started, clock = time.process_time(), time.perf_counter()
    result: dict[str, Any] = {}
    if own.settings is None:
        result["steps"] = supervise(model, tokenizer, seconds=budget_s, seed=seed)
    else:
        result["curve"] = reinforce(model, tokenizer, own, seed=seed)
    result["cpu_s"] = round(time.process_time() - started, 2)
    result["wall_s"] = round(time.perf_counter() - clock, 2)
    return result | {"scores": scores_of(model, tokenizer)}


def summarize(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Gain of every arm and family over its start: mean, 95 % interval over seeds, and claims."""
    rows = []
    for arm, own in ARMS.items():
        done = [found for found in seeds.values() if arm in found["arms"]]
        for family in FAMILIES:
            for name in ("sampled", "greedy", "majority"):
                after = [found["arms"][arm]["scores"][family][name] for found in done]
                before = [found[own.start][family][name] for found in done]
                row: dict[str, Any] = {"arm": arm, "family": family, "score": name}
                if len(done) >= 2:
                    found = compare(after, before)
                    row |= {
                        "start": round(statistics.fmean(before), 4),
                        "end": round(statistics.fmean(after), 4),
                        "gain": round(found.mean, 4),
                        "interval": [round(found.low, 4), round(found.high, 4)],
                        "seeds": found.num_seeds,
                    }
                    rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="pretrained models")
    parser.add_argument("--seeds", default="0,1,2,3,4", metavar="NUMBERS")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAMES")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": WHAT,
        "cpu": cpu_name(),
        "threads": 1,
        "settings": {name: repr(arm) for name, arm in ARMS.items()},
        "seeds": {},
    }
    if options.json.is_file():
        record["seeds"] = json.loads(options.json.read_text(encoding="utf-8"))["seeds"]
    tokenizer = byte_tokenizer()
    for seed in map(int, options.seeds.split(",")):
        own = record["seeds"].setdefault(str(seed), {"arms": {}})
        for arm in options.arms.split(","):
            if arm in own["arms"]:
                continue
            start, further = ARMS[arm].start, ARMS[arm].further
            model = pretrained(seed, tokenizer, directory=options.work, further=further, say=print)
            if start not in own:
                own[start] = scores_of(model, tokenizer)
                print(json.dumps({"seed": seed, start: own[start]}), flush=True)
            budget = own["arms"].get("verifier", {}).get("cpu_s", 0.0)
            own["arms"][arm] = run_arm(arm, model, tokenizer, seed=seed, budget_s=budget)
            said = {name: own["arms"][arm][name] for name in ("cpu_s", "scores")}
            print(json.dumps({"seed": seed, "arm": arm, **said}), flush=True)
            write(options.json, record)
    write(options.json, record)
    return 0


def write(path: Path, record: dict[str, Any]) -> None:
    """What is known so far."""
    record |= {"summary": summarize(record["seeds"]), "load_after": load_average()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
