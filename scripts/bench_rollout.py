"""Rollouts: tokens per second of batched cached decoding, against transformers and row by row.

    python scripts/bench_rollout.py --json bench/results/rollout_cpu.json

Every way decodes the same prompts with the same weights. transformers' `generate` runs on
model/hf.py: as it is, and with ternary codes kept between tokens as ours keeps them. Groups: eight
prompts, eight completions each, drawn. Stops: 64 prompts, likeliest tokens, rows end at one of some
stop tokens; the amount is what was said up to there, and rows that another way says differently
are counted (int8 rounding can turn a last bit into another token). Singly: one completion of eight
prompts, decoded together or one after the other.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model.generation import iter_generate
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache
from scripts.bench_common import BenchOptions, Case, Run, run_bench
from scripts.bench_models import token_model
from training.rl.rollout import sample

NEW_TOKENS = 24
PROMPTS, GROUP = 8, 8
PROMPT_LENGTHS = (6, 14)
TEMPERATURE, TOP_K = 0.8, 40
SIZE = "3M"
Rows = list[list[int]]


def cases(options: BenchOptions) -> list[Case]:
    return [group_case(options), stop_case(options), single_case(options)]


def group_case(options: BenchOptions) -> Case:
    rows = [prompt for prompt in random_prompts(PROMPTS) for _ in range(GROUP)]

    def ours() -> Run:
        model = quickstart_model(options)
        return lambda: sample_rows(model, rows, TEMPERATURE, [])

    def theirs() -> Callable[[], Rows]:
        return transformers_run(quickstart_model(options), rows, TEMPERATURE, [])

    return Case(
        bench="rollout",
        name=f"{SIZE}: {PROMPTS} prompts, {GROUP} completions each, {NEW_TOKENS} tokens",
        unit="tokens/s",
        amount=len(rows) * NEW_TOKENS,
        ways={
            "SIGMA": ours,
            "transformers generate": theirs,
            "transformers generate, codes kept": lambda: with_codes_held(theirs()),
        },
    )


def stop_case(options: BenchOptions) -> Case:
    """The amount is counted before anything is timed, and each way's text is compared with it."""
    rows = random_prompts(PROMPTS * GROUP)
    model = quickstart_model(options)
    stops = stop_tokens(model, rows)
    expected = sample_rows(model, rows, 0.0, stops)
    facts: dict[str, object] = {
        "tokens": sum(map(len, expected)),
        "rows_stopped": sum(len(row) < NEW_TOKENS for row in expected),
    }

    def theirs() -> Callable[[], Rows]:
        run = transformers_run(model, rows, 0.0, stops)
        facts["differing_rows"] = sum(a != b for a, b in zip(run(), expected, strict=True))
        return run

    return Case(
        bench="rollout",
        name=f"{SIZE}: {len(rows)} prompts, rows stop",
        unit="tokens/s",
        amount=sum(map(len, expected)),
        ways={
            "SIGMA": lambda: lambda: sample_rows(model, rows, 0.0, stops),
            "transformers generate": theirs,
            "transformers generate, codes kept": lambda: with_codes_held(theirs()),
        },
        facts=facts,
    )


def single_case(options: BenchOptions) -> Case:
    rows = random_prompts(PROMPTS)
    model = quickstart_model(options)
    return Case(
        bench="rollout",
        name=f"{SIZE}: {PROMPTS} prompts, {NEW_TOKENS} tokens",
        unit="tokens/s",
        amount=len(rows) * NEW_TOKENS,
        ways={
            "SIGMA": lambda: lambda: sample_rows(model, rows, TEMPERATURE, []),
            "one row after the other": lambda: lambda: decode_singly(model, rows, TEMPERATURE),
        },
    )


def quickstart_model(options: BenchOptions) -> SigmaLLM:
    return token_model(options.device).eval()


def random_prompts(number: int) -> Rows:
    """The same `number` prompts at every call, of differing length within PROMPT_LENGTHS."""
    rng = random.Random(0)
    sizes = [rng.randint(*PROMPT_LENGTHS) for _ in range(number)]
    return [[rng.randrange(4096) for _ in range(size)] for size in sizes]


def stop_tokens(model: SigmaLLM, rows: Rows) -> list[int]:
    """Stop tokens that end about half of the greedy rows before their last step."""
    said = sample_rows(model, rows, 0.0, [])
    chosen: list[int] = []
    ended: set[int] = set()
    for number, row in enumerate(said):
        if len(ended) >= len(said) // 2:
            break
        if number not in ended:
            chosen.append(row[len(row) * (number % 4) // 4])
            ended = {i for i, other in enumerate(said) if set(other[:-1]) & set(chosen)}
    return chosen


def sample_rows(model: SigmaLLM, rows: Rows, temperature: float, stops: list[int]) -> Rows:
    return sample(
        model,
        rows,
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        top_k=TOP_K,
        generator=torch.Generator().manual_seed(0),
        stop_ids=stops,
        pad_id=0,
    ).token_rows()


def decode_singly(model: SigmaLLM, rows: Rows, temperature: float) -> Rows:
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(0)
    return [
        list(
            iter_generate(
                model,
                torch.tensor([row], device=device),
                max_new_tokens=NEW_TOKENS,
                temperature=temperature,
                top_k=TOP_K,
                generator=generator,
            )
        )
        for row in rows
    ]


def transformers_run(
    model: SigmaLLM, rows: Rows, temperature: float, stops: list[int]
) -> Callable[[], Rows]:
    """`generate` on left-padded rows; what it returns is cut after the first stop token."""
    from transformers import GenerationConfig

    from model.hf import SigmaForCausalLM

    device = model.embed.weight.device
    peer: SigmaForCausalLM = SigmaForCausalLM.from_sigma(model).eval()
    peer.to(device=device)  # type: ignore[arg-type]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    settings: dict[str, object] = {"do_sample": False}
    if temperature:
        settings = {"do_sample": True, "temperature": temperature, "top_k": TOP_K}
    if stops:
        settings["eos_token_id"] = stops
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, pad_token_id=0, **settings)

    def run() -> Rows:
        output = peer.generate(ids, attention_mask=mask, generation_config=config)
        assert isinstance(output, torch.Tensor)
        return [cut(row, stops) for row in output[:, width:].tolist()]

    return run


def cut(row: list[int], stops: list[int]) -> list[int]:
    """The row up to and with its first stop token; the whole row without one."""
    ends = [place for place, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def with_codes_held(run: Callable[[], Rows]) -> Callable[[], Rows]:
    def held() -> Rows:
        with TernaryCache().held():
            return run()

    return held


def main() -> int:
    return run_bench(__doc__ or "", cases)


if __name__ == "__main__":
    sys.exit(main())
