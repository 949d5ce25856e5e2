"""Completions of a small model that read solved tasks, for the bench of verification.

`python -m scripts.rl_coder OUT.json --work runs/rl_coder` pretrains the model of scripts/rl_text.py
on lines of solved code tasks, a third of which have one sign wrong, and samples a pool of each
held-out task; with `--arithmetic` it is the model that scripts/rl_learns.py starts from, and its
sums and differences. The file is what `scripts/bench_verification.py --completions` reads. Where a
pretrained model of a hundred million parameters is too slow, this one is a real generator too: what
it writes, and how sure of it it is, are its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.sigma_llm import SigmaLLM
from scripts.rl_text import FAMILIES, byte_tokenizer, new_model, pretrained, read_text
from scripts.rl_text import LEVELS as ARITHMETIC
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.tasks import Task, draw_task, split_of
from training.rl.verifier import Verifier
from training.tokenizer import Tokenizer

LEVELS = (("expression", 1), ("expression", 2), ("function", 1))
ARITHMETIC_LEVELS = tuple((family, ARITHMETIC[family]) for family in FAMILIES)
SLIP_SHARE = 0.35
SIGNS = "+-*xyz23456789"
NEW_TOKENS = 40
SAMPLING = CandidateSettings(group_size=2, max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=40)


def written_solution(task: Task, rng: random.Random) -> str:
    """The task's solution, or it with one sign exchanged."""
    places = [place for place, sign in enumerate(task.solution) if sign in SIGNS]
    if not places or rng.random() >= SLIP_SHARE:
        return task.solution
    place = rng.choice(places)
    return task.solution[:place] + rng.choice(SIGNS) + task.solution[place + 1 :]


def code_lines(tokenizer: Tokenizer, rng: random.Random) -> Iterator[list[int]]:
    """Documents of one task each, none of them of the test split."""
    while True:
        family, level = rng.choice(LEVELS)
        task = draw_task(family, level=level, rng=rng)
        if split_of(task.prompt) != "test":
            text = task.prompt + written_solution(task, rng)
            yield [tokenizer.end_id, *tokenizer.encode(text)]


def pretrained_coder(tokenizer: Tokenizer, *, seed: int, steps: int, work: Path) -> SigmaLLM:
    work.mkdir(parents=True, exist_ok=True)
    model, path = new_model(seed, tokenizer), work / f"coder_{seed}_{steps}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    lines = code_lines(tokenizer, random.Random(seed))
    read_text(model, tokenizer, lines, steps=steps, seed=seed, say=print)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return model


def held_out(family: str, level: int, *, count: int, seed: int) -> Iterator[tuple[str, Task]]:
    """Seeds and the tasks of the test split that they draw."""
    number = 0
    while count:
        own = f"{seed} {family} {level} {number}"
        task = draw_task(family, level=level, rng=random.Random(own))
        number += 1
        if split_of(task.prompt) == "test":
            count -= 1
            yield own, task


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the model is kept")
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining")
    parser.add_argument("--tasks", type=int, default=10, help="of each family and level")
    parser.add_argument("--pool", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arithmetic", action="store_true", help="sums and differences, not code")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer()
    if options.arithmetic:
        levels = ARITHMETIC_LEVELS
        model = pretrained(options.seed, tokenizer, directory=options.work, say=print)
    else:
        levels, own = LEVELS, {"seed": options.seed, "steps": options.steps}
        model = pretrained_coder(tokenizer, work=options.work, **own)
    maker = CandidateMaker(model, tokenizer, Verifier(code=False, timeout_ms=2500), SAMPLING)
    generator = torch.Generator().manual_seed(options.seed)
    begun, items = time.process_time(), []
    for family, level in levels:
        # A body of one line ends where a line ends, as an expression does.
        for own, task in held_out(family, level, count=options.tasks, seed=options.seed):
            rollout = maker.draft(
                [maker.prompt_of(task)] * options.pool,
                temperature=SAMPLING.temperature,
                top_k=SAMPLING.top_k,
                generator=generator,
            )
            texts = rollout.texts(tokenizer, stop_ids=maker.stop_ids)
            pool = [
                {"text": text, "mean_log_prob": value}
                for text, value in zip(texts, rollout.mean_log_probs().tolist())
            ]
            items.append({"family": family, "level": level, "task_seed": own, "pool": pool})
    maker.verifier.close()
    report = {
        "model": f"{sum(p.numel() for p in model.parameters())} parameters",
        "temperature": SAMPLING.temperature,
        "top_k": SAMPLING.top_k,
        "new_tokens": NEW_TOKENS,
        "seed": options.seed,
        "seconds": round(time.process_time() - begun, 2),
        "items": items,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print({name: value for name, value in report.items() if name != "items"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
