"""Does replay help? Arms from one small model that reads on and learns from rewards meanwhile.

    python scripts/replay_helps.py --json bench/results/replay_cpu.json --work runs/replay

A model of each seed has read the text of scripts/rl_text.py. Every arm goes on reading the same
rows and has the same RL ticks; `none` replays nothing, the others put items of the buffer into row
0 by the same coins, so that all read equally many tokens. `uniform` draws them uniformly,
`prioritised` by verdict, quality and novelty, `causal` by their measured uplift as well, and
`shuffled` is its placebo. Held-out tasks say what came of it, and held-out text what it cost.

The file is written after every arm, and an arm that it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from model.sigma_llm import SigmaLLM
from scripts.bench_common import cpu_name, load_average
from scripts.paired import compare
from scripts.rl_text import (
    CORPUS_ROWS,
    FAMILIES,
    OWN_ROWS,
    FixedLevels,
    arithmetic_lines,
    byte_tokenizer,
    config_of,
    corpus_lines,
    examine,
    held_out_tasks,
    pretrained,
    rows_of,
)
from training.optimizer import build_optimizer
from training.probe import evaluating
from training.replay.buffer import ReplayBuffer, reference_items
from training.replay.causal_replay import CausalReplay, Coin, ReplaySettings
from training.replay.injection import inject, item_loss
from training.replay.priority import PriorityWeights
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.learner import Learner, LearnerSettings
from training.rl.objectives import ClipSettings
from training.rl.policy_update import PolicyUpdate, UpdateSettings
from training.rl.verifier import Verifier
from training.stream.batch import Batch
from training.tokenizer import Tokenizer

WHAT = "Does replay help? Arms from one small model that reads on and learns from rewards."
STEPS, TICK_EVERY, TASKS, RL_LR, LR_FACTOR = 240, 8, 16, 6e-4, 0.2
TEXT_SEED, PROBE_SEED, REPORT_SEED = 5000, 6000, 7000
SAMPLING = CandidateSettings(group_size=8, max_new_tokens=6, temperature=0.8, top_k=40)
UNIFORM = PriorityWeights(verifier=1.0, quality=0.0, novelty=0.0)
ARMS: dict[str, ReplaySettings | None] = {
    "none": None,
    "uniform": ReplaySettings(weights=UNIFORM, alpha=0.0),
    "prioritised": ReplaySettings(alpha=0.0),
    "causal": ReplaySettings(),
    "shuffled": ReplaySettings(is_shuffled=True),
}


class Rows:
    """Batches of the text of a seed: lines of arithmetic with slips, and the corpus."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self._end_id = tokenizer.end_id
        rng = random.Random(seed)
        self._parts = [
            rows_of(arithmetic_lines(tokenizer, rng), OWN_ROWS),
            rows_of(corpus_lines(tokenizer), CORPUS_ROWS),
        ]

    def next_batch(self) -> Batch:
        """The next rows of every part, stacked; labels are shifted, resets stand at end-of-text
        tokens."""
        rows = torch.cat([next(part) for part in self._parts])
        inputs = rows[:, :-1].contiguous()
        return Batch(
            input_ids=inputs,
            labels=rows[:, 1:].contiguous(),
            reset_mask=inputs == self._end_id,
            source_ids=torch.zeros(inputs.shape, dtype=torch.int16),
            num_bytes=0,
        )


def loss_on(model: SigmaLLM, batches: Sequence[Batch]) -> float:
    losses = []
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
            assert output.loss is not None
            losses.append(float(output.loss))
    return statistics.fmean(losses)


def learner_of(model: SigmaLLM, tokenizer: Tokenizer, *, seed: int) -> Learner:
    settings = UpdateSettings(
        main="cispo", clip=ClipSettings(), lr=RL_LR, entropy_weight=0.001, kl_weight=0.02
    )
    return Learner(
        LearnerSettings(mode="cispo", tasks=TASKS, budget_max=1, eval_every=0),
        maker=CandidateMaker(model, tokenizer, Verifier(code=False, timeout_ms=2500), SAMPLING),
        update=PolicyUpdate(model, settings),
        sampler=FixedLevels(FAMILIES, seed=seed),
        val_sampler=FixedLevels(FAMILIES, split="val", seed=seed),
    )


def replay_of(
    settings: ReplaySettings | None, tokenizer: Tokenizer, *, seed: int
) -> CausalReplay | None:
    """Replay whose buffer opens with reference solutions of training tasks; None without
    settings."""
    if settings is None:
        return None
    buffer = ReplayBuffer(capacity=512)
    for item in reference_items(FixedLevels(FAMILIES, seed=-1 - seed), tokenizer):
        buffer.admit(item)
    return CausalReplay(settings, buffer)


def training_loss(model: SigmaLLM, batch: Batch, coin: Coin | None) -> Tensor:
    """As in a run: the item takes row 0's share of the loss."""
    if coin is None or not coin.heads:
        output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
        assert output.loss is not None
        return output.loss
    batch = inject(batch, coin.item)
    output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
    assert output.loss is not None
    share = 1.0 / len(batch.input_ids)
    own = coin.weight * item_loss(model, output.hidden, coin.item)
    return (1.0 - share) * output.loss + share * own


def read_on(model: SigmaLLM, tokenizer: Tokenizer, arm: str, *, seed: int) -> dict[str, Any]:
    """The arm's steps and ticks; what its replay found."""
    replay = replay_of(ARMS[arm], tokenizer, seed=seed)
    learner = learner_of(model, tokenizer, seed=seed)
    rows = Rows(tokenizer, seed=TEXT_SEED + seed)
    probe = [Rows(tokenizer, seed=PROBE_SEED + seed).next_batch()]
    optimizer = build_optimizer(model, config_of(seed).optim, seed=seed)
    optimizer.set_schedule(lr_factor=LR_FACTOR, decay_factor=1.0)
    coins, trusted = random.Random(f"{seed} coins"), 0
    for step in range(1, STEPS + 1):
        batch, coin, number = rows.next_batch(), None, coins.getrandbits(62)
        if replay is not None and replay.loss is not None and step % 2 == 0:
            coin = replay.flip(seed=number, row_tokens=batch.input_ids.shape[1])
        model.train()
        training_loss(model, batch, coin).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step()
        if step % TICK_EVERY == 0:
            passed = learner.tick(seed=1000 * seed + step).passed
            if replay is not None:
                replay.admit(passed, step=step)
        if replay is not None:
            replay.finish_step(loss_on(model, probe), coin=coin)
            trusted += sum(own.is_trusted for own in replay.uplift.clusters.values())
    learner.close()
    if replay is None:
        return {}
    found = {name: round(value, 5) for name, value in replay.metrics().items() if value == value}
    clusters = {
        name: [own.count, round(own.mean, 5), round(own.error, 5)]
        for name, own in sorted(replay.uplift.clusters.items())
        if own.count > 1
    }
    return found | {"trusted_steps": trusted, "clusters": clusters}


def run_arm(arm: str, tokenizer: Tokenizer, model: SigmaLLM, *, seed: int) -> dict[str, Any]:
    """Loss on text and pass rates after the arm, with `cpu_s`. The given model is trained in
    place."""
    started = time.process_time()
    result: dict[str, Any] = {"replay": read_on(model, tokenizer, arm, seed=seed)}
    result["cpu_s"] = round(time.process_time() - started, 2)
    report = Rows(tokenizer, seed=REPORT_SEED)
    result["text_loss"] = loss_on(model, [report.next_batch() for _ in range(16)])
    scores = [examine(model, tokenizer, held_out_tasks(name), SAMPLING) for name in FAMILIES]
    for name in ("sampled", "greedy"):
        result[name] = statistics.fmean(getattr(score, name) for score in scores)
    return result


def summarize(seeds: dict[str, Any]) -> list[dict[str, Any]]:
    """Every arm against `none`, and the causal one against its placebo and plain priorities."""
    pairs = [(arm, "none") for arm in ARMS if arm != "none"]
    pairs += [("causal", "prioritised"), ("causal", "shuffled")]
    rows = []
    for arm, other in pairs:
        done = [found for found in seeds.values() if arm in found and other in found]
        if len(done) < 2:
            continue
        for name in ("sampled", "greedy", "text_loss"):
            ours, theirs = ([found[own][name] for found in done] for own in (arm, other))
            found = compare(ours, theirs)
            rows.append(
                {
                    "arm": arm,
                    "against": other,
                    "score": name,
                    "mean": round(statistics.fmean(ours), 4),
                    "difference": round(found.mean, 4),
                    "interval": [round(found.low, 4), round(found.high, 4)],
                    "seeds": found.num_seeds,
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="pretrained models")
    parser.add_argument("--seeds", default="0,1,2", metavar="NUMBERS")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAMES")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "what": WHAT,
        "command": "python scripts/replay_helps.py --json FILE --work DIR",
        "cpu": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "threads": 1,
        "settings": {
            "steps": STEPS,
            "tick_every": TICK_EVERY,
            "tasks": TASKS,
            **{name: repr(arm) for name, arm in ARMS.items()},
        },
        "seeds": {},
    }
    if options.json.is_file():
        record["seeds"] = json.loads(options.json.read_text(encoding="utf-8"))["seeds"]
    tokenizer = byte_tokenizer()
    for seed in map(int, options.seeds.split(",")):
        own = record["seeds"].setdefault(str(seed), {})
        for arm in options.arms.split(","):
            if arm in own:
                continue
            model = pretrained(seed, tokenizer, directory=options.work, say=print)
            own[arm] = run_arm(arm, tokenizer, model, seed=seed)
            said = {name: own[arm][name] for name in ("cpu_s", "sampled", "greedy", "text_loss")}
            print(json.dumps({"seed": seed, "arm": arm, **said}), flush=True)
            record |= {"summary": summarize(record["seeds"]), "load_after": load_average()}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
