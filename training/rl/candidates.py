"""From tasks to rewarded groups: draft, shortlist, verify or vote, reward, and retry what failed.

Of a task's pool, `group_size` candidates drawn uniformly are what the policy learns from; the
best-scored rest are verified as well, but only serve refinement, so choosing them cannot bias the
gradient. With majority labels the whole pool votes and no verdict enters a reward;
verdicts are then measured for the report alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.rl.answers import extract_answer
from training.rl.cascade import VerifierCascade
from training.rl.igrpo import best_drafts
from training.rl.rewards import shaped_rewards
from training.rl.rollout import Rollout, sample
from training.rl.shortlist import choose, discriminative_scores, pool_size, recall_at_k
from training.rl.tasks import Task
from training.rl.verifier import Judgement, Verifier
from training.rl.votes import Vote, majority_rewards, majority_vote

POOL_HEAT = 1.1  # drafts of a larger pool are sampled a little hotter


class Tokens(Protocol):
    """The part of a tokenizer that tasks need."""

    end_id: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Any) -> str: ...


@dataclass(slots=True, kw_only=True, frozen=True)
class CandidateSettings:
    """label_mode: "verifier" or "majority". placebo: "none", "permuted" (rewards are dealt out anew
    inside each group) or "random" (drawn). asym: draft pool_multiplier times the group and verify
    `topk` of it. refine_*: how failed candidates are retried; 0 iterations = never.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_k: int
    label_mode: str = "verifier"
    majority_min_share: float = 0.5
    placebo: str = "none"
    asym: bool = False
    pool_multiplier: float = 1.0
    topk: int = 8
    score_weight: float = 0.35
    refine_iters: int = 0
    temperature_decay: float = 0.75
    top_k_decay: float = 0.85
    refine_fraction: float = 0.5
    min_refined: int = 2

    @property
    def pool(self) -> int:
        return pool_size(self.group_size, self.pool_multiplier) if self.asym else self.group_size


@dataclass(slots=True, kw_only=True)
class TaskGroup:
    """What became of one task. passing: a verified completion from outside the group, if the group
    has none that passes. vote: of the whole pool.
    """

    task: Task
    prompt: list[int]
    texts: list[str]
    judgements: list[Judgement]
    vote: Vote
    kept_out: int
    verified: int
    passing: list[int] | None = None
    recall: float = math.nan

    @property
    def has_passed(self) -> bool:
        return any(judgement.passed for judgement in self.judgements)


@dataclass(slots=True, kw_only=True)
class Candidates:
    """The groups of one tick; rollout rows and rewards (tasks, G) in the order of the groups."""

    groups: list[TaskGroup]
    rollout: Rollout
    rewards: Tensor
    scores_mean: float
    num_tokens: int
    num_refined: int = 0
    decided_early: int = 0


class CandidateMaker:
    """Draws completions of tasks and rewards them. Keeps no state but the running pass rate."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokens,
        verifier: Verifier,
        settings: CandidateSettings,
        *,
        cascade: VerifierCascade | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.verifier = verifier
        self.cascade = cascade
        self.settings = settings
        self.stop_ids = (tokenizer.end_id, *tokenizer.encode("\n"))
        self._autocast = autocast

    def make(
        self, tasks: Sequence[Task], *, pass_rate: float, seed: int, refine: bool
    ) -> Candidates:
        """Candidates of all tasks; everything random in it follows from `seed`."""
        own, rng = self.settings, random.Random(seed)
        generator = torch.Generator(self.model.embed.weight.device).manual_seed(seed)
        prompts = [self.prompt_of(task) for task in tasks]
        heat = POOL_HEAT if own.asym else 1.0
        pool = self.draft(
            [prompt for prompt in prompts for _ in range(own.pool)],
            temperature=own.temperature * heat,
            top_k=own.top_k,
            generator=generator,
        )
        texts = pool.texts(self.tokenizer, stop_ids=self.stop_ids)
        log_probs = pool.mean_log_probs().tolist()
        scores = self._scores(tasks, texts, log_probs)
        groups, rows = [], []
        chosen = self._shortlist(len(tasks), scores, rng)
        verdicts = iter(self._verify(tasks, texts, log_probs, chosen, rng))
        for number, (task, (group, rest)) in enumerate(zip(tasks, chosen)):
            first = number * own.pool
            own_texts = texts[first : first + own.pool]
            judged = [next(verdicts) for _ in (*group, *rest)]
            rows += [first + place for place in group]
            answers = [extract_answer(text, task) for text in own_texts]
            passed = (r for r, j in zip(rest, judged[len(group) :]) if j.passed)
            passing = next(passed, None) if own.label_mode == "verifier" else None
            groups.append(
                TaskGroup(
                    task=task,
                    prompt=prompts[number],
                    texts=[own_texts[place] for place in group],
                    judgements=judged[: len(group)],
                    vote=majority_vote(answers, min_share=own.majority_min_share),
                    kept_out=own.pool - len(judged),
                    verified=len(judged),
                    passing=None if passing is None else self._said(pool, first + passing),
                    recall=self._recall(task, answers, (*group, *rest)),
                )
            )
        made = Candidates(
            groups=groups,
            rollout=pool.select(rows),
            rewards=torch.empty(0),
            scores_mean=sum(scores) / len(scores),
            num_tokens=pool.num_tokens,
        )
        rows = [
            self._reward_row(g, g.texts, g.judgements, pass_rate=pass_rate, rng=rng) for g in groups
        ]
        made.rewards = torch.tensor(rows, dtype=torch.float32)
        if self.cascade is not None:
            made.decided_early = self.cascade.decided_early
        if refine and own.refine_iters and own.label_mode == "verifier":
            self._refine(made, generator=generator, rng=rng)
        return made

    def prompt_of(self, task: Task) -> list[int]:
        """Tokens of the prompt; like every document it opens with the end-of-text token."""
        return [self.tokenizer.end_id, *self.tokenizer.encode(task.prompt)]

    def draft(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        top_k: int,
        generator: torch.Generator,
    ) -> Rollout:
        """A completion for every prompt (see `sample`), under the run's autocast."""
        with self._autocast():
            return sample(
                self.model,
                prompts,
                max_new_tokens=self.settings.max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                generator=generator,
                stop_ids=self.stop_ids,
                pad_id=self.tokenizer.end_id,
            )

    def _scores(
        self, tasks: Sequence[Task], texts: Sequence[str], log_probs: Sequence[float]
    ) -> list[float]:
        """How promising each candidate of the pool looks, before anything is verified."""
        own = self.settings
        spread = [task for task in tasks for _ in range(own.pool)]
        if self.cascade is None:
            chances = [float(extract_answer(x, t) is not None) for t, x in zip(spread, texts)]
        else:
            chances = self.cascade.p_pass(spread, texts, mean_log_probs=log_probs)
        scores: list[float] = []
        for first in range(0, len(texts), own.pool):
            part = slice(first, first + own.pool)
            scores += discriminative_scores(log_probs[part], chances[part], weight=own.score_weight)
        return scores

    def _shortlist(
        self, num_tasks: int, scores: Sequence[float], rng: random.Random
    ) -> list[tuple[list[int], list[int]]]:
        """Places in each task's pool: the group, and the rest that is verified too."""
        own, chosen = self.settings, []
        for number in range(num_tasks):
            if not own.asym:
                chosen.append((list(range(own.group_size)), []))
                continue
            part = scores[number * own.pool : (number + 1) * own.pool]
            short = choose(part, own.group_size, max(own.topk, own.group_size), rng=rng)
            chosen.append((list(short.group), list(short.rest)))
        return chosen

    def _verify(
        self,
        tasks: Sequence[Task],
        texts: Sequence[str],
        log_probs: Sequence[float],
        chosen: Sequence[tuple[list[int], list[int]]],
        rng: random.Random,
    ) -> list[Judgement]:
        rows = [
            (task, number * self.settings.pool + place)
            for number, (task, (group, rest)) in enumerate(zip(tasks, chosen))
            for place in (*group, *rest)
        ]
        return self.judge(
            [task for task, _ in rows],
            [texts[row] for _, row in rows],
            log_probs=[log_probs[row] for _, row in rows],
            rng=rng,
        )

    def judge(
        self,
        tasks: Sequence[Task],
        texts: Sequence[str],
        *,
        log_probs: Sequence[float],
        rng: random.Random,
    ) -> list[Judgement]:
        """The verifier's or the cascade's judgements."""
        if self.cascade is None:
            return self.verifier.verify(tasks, texts, rng=rng)
        return self.cascade.verify(tasks, texts, mean_log_probs=log_probs, rng=rng)

    def examine(self, tasks: Sequence[Task], *, seed: int) -> list[Judgement]:
        """One completion per task, judged strictly; the cascade is calibrated by them."""
        own, rng = self.settings, random.Random(seed)
        generator = torch.Generator(self.model.embed.weight.device).manual_seed(seed)
        rollout = self.draft(
            [self.prompt_of(task) for task in tasks],
            temperature=own.temperature,
            top_k=own.top_k,
            generator=generator,
        )
        texts = rollout.texts(self.tokenizer, stop_ids=self.stop_ids)
        judged = self.verifier.judge(tasks, texts, rng=rng)
        if self.cascade is not None:
            log_probs = rollout.mean_log_probs().tolist()
            self.cascade.calibrate(tasks, texts, judged, mean_log_probs=log_probs, rng=rng)
        return judged

    def second_stage(
        self, made: Candidates, *, pass_rate: float, seed: int
    ) -> tuple[Rollout, Tensor]:
        """A group of refinements of every task's best draft, and their rewards (tasks, G).

        The draft is the group's best, or a candidate from outside it if only that one passes.
        """
        own, rng = self.settings, random.Random(seed)
        generator = torch.Generator(self.model.embed.weight.device).manual_seed(seed)
        shape = (len(made.groups), own.group_size)
        places = best_drafts(made.rewards, made.rollout.mean_log_probs().cpu().view(shape)).tolist()
        said = made.rollout.token_rows(stop_ids=self.stop_ids)
        separator = self.tokenizer.encode("\n")
        prompts = []
        for number, group in enumerate(made.groups):
            draft = said[number * own.group_size + places[number]]
            if group.passing is not None and not group.has_passed:
                draft = group.passing
            prompts += [[*group.prompt, *draft, *separator, *group.prompt]] * own.group_size
        rollout = self.draft(
            prompts, temperature=own.temperature, top_k=own.top_k, generator=generator
        )
        made.num_tokens += rollout.num_tokens
        texts = rollout.texts(self.tokenizer, stop_ids=self.stop_ids)
        tasks = [group.task for group in made.groups for _ in range(own.group_size)]
        judged = self.judge(tasks, texts, log_probs=rollout.mean_log_probs().tolist(), rng=rng)
        rows = [
            self._reward_row(group, texts[part], judged[part], pass_rate=pass_rate, rng=rng)
            for number, group in enumerate(made.groups)
            for part in [slice(number * own.group_size, (number + 1) * own.group_size)]
        ]
        return rollout, torch.tensor(rows, dtype=torch.float32)

    def _reward_row(
        self,
        group: TaskGroup,
        texts: Sequence[str],
        judgements: Sequence[Judgement],
        *,
        pass_rate: float,
        rng: random.Random,
    ) -> list[float]:
        """Rewards of completions of one task: by verdict, or by agreement with the vote."""
        own = self.settings
        if own.placebo == "random":
            return [float(rng.random() < 0.5) for _ in texts]
        if own.label_mode == "majority":
            answers = [extract_answer(text, group.task) for text in texts]
            row = majority_rewards(answers, group.vote)
        else:
            tasks = [group.task] * len(texts)
            row = shaped_rewards(judgements, tasks, texts, pass_rate=pass_rate)
        row = list(row)
        if own.placebo == "permuted":
            rng.shuffle(row)
        return row

    def _refine(self, made: Candidates, *, generator: torch.Generator, rng: random.Random) -> None:
        """Retry tasks of which no candidate passed, colder each time, until one does."""
        own = self.settings
        temperature, top_k = own.temperature, float(own.top_k)
        per_task = max(own.min_refined, round(own.refine_fraction * made.groups[0].verified))
        for _ in range(own.refine_iters):
            failed = [
                group for group in made.groups if group.passing is None and not group.has_passed
            ]
            if not failed or per_task == 0:
                return
            temperature, top_k = temperature * own.temperature_decay, top_k * own.top_k_decay
            rows = [group for group in failed for _ in range(per_task)]
            rollout = self.draft(
                [group.prompt for group in rows],
                temperature=temperature,
                top_k=max(1, round(top_k)) if own.top_k else 0,
                generator=generator,
            )
            made.num_refined += len(rows)
            made.num_tokens += rollout.num_tokens
            texts = rollout.texts(self.tokenizer, stop_ids=self.stop_ids)
            judged = self.judge(
                [group.task for group in rows],
                texts,
                log_probs=rollout.mean_log_probs().tolist(),
                rng=rng,
            )
            for row, (group, judgement) in enumerate(zip(rows, judged)):
                if judgement.passed and group.passing is None:
                    group.passing = self._said(rollout, row)

    def _said(self, rollout: Rollout, row: int) -> list[int]:
        return rollout.select([row]).token_rows(stop_ids=self.stop_ids)[0]

    @staticmethod
    def _recall(task: Task, answers: Sequence[str | None], places: Sequence[int]) -> float:
        """Share of the pool's right answers that were verified; of code it is not known."""
        if task.answer is None:
            return math.nan
        return recall_at_k([answer == task.answer for answer in answers], places)
