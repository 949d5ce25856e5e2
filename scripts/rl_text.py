"""The small world of scripts/rl_learns.py: a text with slips, a model that read it, an examination.

The text is the embedded corpus and lines of arithmetic by somebody who errs: every third sum or
difference is off by 1, 2 or 10. So the model comes out unsure of them, but its majority is usually
right, the more so when it has read more of it. In the misled text, which a model may read
afterwards, as with products in both, the commonest answer to each is a wrong one, always by the
same slip, and the right one comes second: there the majority is wrong, and a model that believed it
would be sure of a wrong rule. In the torn text it is wrong too, but seldom has half of the votes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.sigma_llm import SigmaLLM
from training.config.cli import parse_args
from training.config.sigma_config import SigmaConfig
from training.instant import apply_instant
from training.optimizer import build_optimizer
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.tasks import Task, TaskSampler, draw_task
from training.rl.verifier import Verifier
from training.sources.base import split_of
from training.sources.embedded import EmbeddedCorpus
from training.stream.batch import IGNORED_LABEL
from training.tokenizer import Tokenizer, train_bpe

MODEL_FLAGS = (
    "--no-require-cuda --device cpu --d-model 64 --n-heads 4 --n-layers 2 --mamba-ratio 1 "
    "--attention-ratio 1 --kv-latent-dim 32 --rope-dim 16 --mamba-head-dim 32 --mamba-d-state 16 "
    "--mamba-chunk-len 32 --mimo-rank 1 --d-ff 192 --n-routed-experts 0 --quant-mode none "
    "--lr 0.02 --adam-lr 0.01"
).split()
FAMILIES = ("add", "subtract")
PRODUCTS = "multiply"
LEVELS = {"add": 2, "subtract": 2, "multiply": 1}
SLIP_SHARE = 0.35
SLIPS = (-10, -2, -1, 1, 2, 10)
# Where the majority is wrong: shares of the right answer and of the common slip; the rest is spread
# over the others.
Wrong = tuple[tuple[float, float], tuple[int, ...]]
OF_PRODUCTS = (0.27, 0.33)
COMMON_SLIP, MISLED_SLIP = 3, 10
RARE_SLIPS, TORN_SLIPS = (-12, -10, -4, -2, -1, 1, 2, 10), (20, 30, 40, 50, 60, 70)
ROW_TOKENS, OWN_ROWS, CORPUS_ROWS = 128, 8, 1
PRETRAIN_ROUNDS, WARMUP_STEPS = (650, 400), 20
# What a model may read after these rounds: steps, and where the majority is wrong its shares and
# rare slips. All of the torn text err by tens, or the unit digits would settle which ten is right.
MORE, MISLED, TORN = "more", "misled", "torn"
FURTHER: dict[str, tuple[int, Wrong | None]] = {
    MORE: (600, None),
    MISLED: (450, ((0.19, 0.51), RARE_SLIPS)),
    TORN: (600, ((0.22, 0.34), TORN_SLIPS)),
}
CORPUS_BYTES = 4_000_000
EXAM_SAMPLES = 16


@dataclass(slots=True, kw_only=True, frozen=True)
class Score:
    """On held-out tasks of one family: share of passing samples, of passing likeliest answers, and
    of prompts on which the majority of the samples passes."""

    tasks: int
    sampled: float
    greedy: float
    majority: float

    def to_dict(self) -> dict[str, Any]:
        """Rounded to four places."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


class FixedLevels(TaskSampler):
    """Tasks of one level per family, so that before and after are the same examination."""

    def draw(self, *, family: str | None = None, level: int | None = None) -> Task:
        rng = random.Random(f"{self._seed} family {self._num_draws}")
        family = rng.choice(self.families) if family is None else family
        return super().draw(family=family, level=level or LEVELS[family])


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, so that numbers are read digit by digit."""
    return Tokenizer(train_bpe([], vocab_size=257).encode())


def config_of(seed: int) -> SigmaConfig:
    return parse_args([*MODEL_FLAGS, "--seed", str(seed)])


def new_model(seed: int, tokenizer: Tokenizer) -> SigmaLLM:
    """Initial weights of the seed, on the CPU, with the activation memory patched but keeping
    everything."""
    model = SigmaLLM(config_of(seed).model_config(tokenizer.vocab_size), seed=seed)
    apply_instant(model)
    return model


def written_answer(task: Task, rng: random.Random, *, misled: Wrong | None = None) -> str:
    """What the text says a task's answer is."""
    answer, point = int(task.answer or "0"), rng.random()
    if task.family != PRODUCTS and misled is None:
        return str(answer + (rng.choice(SLIPS) if point < SLIP_SHARE else 0))
    (right, common), rare_slips = misled or (OF_PRODUCTS, RARE_SLIPS)
    if point < right:
        return str(answer)
    slip = MISLED_SLIP if misled else COMMON_SLIP
    if point < right + common:
        return str(answer + slip)
    return str(answer + rng.choice([rare for rare in rare_slips if rare != slip]))


def arithmetic_lines(
    tokenizer: Tokenizer, rng: random.Random, *, misled: Wrong | None = None
) -> Iterator[list[int]]:
    """Documents of one line each, of all levels up to the examined one."""
    while True:
        family = rng.choices((*FAMILIES, PRODUCTS), weights=(4, 4, 2))[0]
        task = draw_task(family, level=rng.randint(1, LEVELS[family]), rng=rng)
        text = f"{task.prompt}{written_answer(task, rng, misled=misled)}\n"
        yield [tokenizer.end_id, *tokenizer.encode(text)]


def corpus_lines(tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Training documents of the embedded corpus."""
    texts, size = [], 0
    for document in EmbeddedCorpus().documents():
        if split_of(document.id) == "train" and size < CORPUS_BYTES:
            texts.append(document.text)
            size += len(document.text)
    while True:
        for text in texts:
            yield [tokenizer.end_id, *tokenizer.encode(text)]


def rows_of(lines: Iterator[list[int]], count: int) -> Iterator[Tensor]:
    """Windows (count, ROW_TOKENS + 1) of the concatenated lines."""
    waiting: list[int] = []
    needed = count * (ROW_TOKENS + 1)
    while True:
        while len(waiting) < needed:
            waiting += next(lines)
        yield torch.tensor(waiting[:needed]).view(count, -1)
        waiting = waiting[needed:]


def read_text(
    model: SigmaLLM,
    tokenizer: Tokenizer,
    lines: Iterator[list[int]],
    *,
    steps: int,
    seed: int,
    say: Callable[[str], object],
) -> None:
    """One round of pretraining on these lines and the corpus, with a learning rate that rises and
    falls."""
    optimizer = build_optimizer(model, config_of(seed).optim, seed=seed)
    own = rows_of(lines, OWN_ROWS)
    corpus = rows_of(corpus_lines(tokenizer), CORPUS_ROWS)
    model.train()
    for step in range(1, steps + 1):
        remaining = (steps - step) / (0.5 * steps)
        factor = min(1.0, step / WARMUP_STEPS, max(0.05, remaining))
        optimizer.set_schedule(lr_factor=factor, decay_factor=1.0)
        rows = torch.cat([next(own), next(corpus)])
        inputs = rows[:, :-1]
        output = model(inputs, reset_mask=inputs == tokenizer.end_id, labels=rows[:, 1:])
        assert output.loss is not None
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_optimizer_step()
        if step % 100 == 0:
            say(f"seed {seed}: pretraining step {step}, loss {float(output.loss.detach()):.3f}")


def pretrained(
    seed: int,
    tokenizer: Tokenizer,
    *,
    directory: Path,
    say: Callable[[str], object],
    further: str | None = None,
) -> SigmaLLM:
    """The pretrained model of a seed; `further` names one more round, of the same text or the
    misled one. Rounds whose files there are, are not done again."""
    directory.mkdir(parents=True, exist_ok=True)
    model = new_model(seed, tokenizer)
    rounds = [
        (f"pretrained_{seed}_{number}", steps) for number, steps in enumerate(PRETRAIN_ROUNDS)
    ]
    if further is not None:
        rounds.append((f"{further}_{seed}", FURTHER[further][0]))
    for number, (name, steps) in enumerate(rounds):
        path = directory / f"{name}.safetensors"
        if path.is_file():
            model.load_state_dict(load_file(path))
            continue
        own = seed + 1000 * number
        misled = FURTHER[further][1] if further and number == len(PRETRAIN_ROUNDS) else None
        lines = arithmetic_lines(tokenizer, random.Random(own), misled=misled)
        read_text(model, tokenizer, lines, steps=steps, seed=own, say=say)
        save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    return model


def held_out_tasks(family: str) -> list[Task]:
    """Every task of the test split at the examined level, by prompt."""
    sampler = FixedLevels((family,), split="test", seed=0)
    found = {task.prompt: task for task in (sampler.draw() for _ in range(2000))}
    return [found[prompt] for prompt in sorted(found)]


def examine(
    model: SigmaLLM, tokenizer: Tokenizer, tasks: Sequence[Task], settings: CandidateSettings
) -> Score:
    """Scores on these tasks, sampled as in training; the same random numbers every time."""
    verifier = Verifier(code=False, timeout_ms=2500)
    maker = CandidateMaker(model, tokenizer, verifier, settings)
    prompts = [maker.prompt_of(task) for task in tasks]

    def judged(samples: int, temperature: float) -> list[Any]:
        rollout = maker.draft(
            [prompt for prompt in prompts for _ in range(samples)],
            temperature=temperature,
            top_k=settings.top_k if temperature else 0,
            generator=torch.Generator().manual_seed(11),
        )
        texts = rollout.texts(tokenizer, stop_ids=maker.stop_ids)
        spread = [task for task in tasks for _ in range(samples)]
        return verifier.verify(spread, texts, rng=random.Random(11))

    samples, greedy = judged(EXAM_SAMPLES, settings.temperature), judged(1, 0.0)
    right = 0
    for number, task in enumerate(tasks):
        part = samples[number * EXAM_SAMPLES : (number + 1) * EXAM_SAMPLES]
        votes = Counter(item.answer for item in part if item.answer is not None)
        right += bool(votes) and votes.most_common(1)[0][0] == task.answer
    verifier.close()
    return Score(
        tasks=len(tasks),
        sampled=sum(item.passed for item in samples) / len(samples),
        greedy=sum(item.passed for item in greedy) / len(greedy),
        majority=right / len(tasks),
    )


def solution_rows(tokenizer: Tokenizer, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Inputs and labels (N, T) of right solutions; only the completion is learned."""
    rows, starts = [], []
    for task in tasks:
        prompt = [tokenizer.end_id, *tokenizer.encode(task.prompt)]
        rows.append([*prompt, *tokenizer.encode(task.solution)])
        starts.append(len(prompt))
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), tokenizer.end_id)
    labels = torch.full((len(rows), length), IGNORED_LABEL)
    for number, (row, start) in enumerate(zip(rows, starts)):
        tokens[number, : len(row)] = torch.tensor(row)
        labels[number, start : len(row)] = torch.tensor(row[start:])
    return tokens[:, :-1], labels[:, 1:]
