"""The smallest RL loop with every part of a tick, on a task that a fresh model learns in seconds.

A prompt is some symbols and a separator; the reward of a completion is the share of the symbols it
says again in their places. A tick samples a group for each of some prompts, if igrpo takes part a
second group after the best drafts, and makes two updates on a blend of objectives: from the second
on, old and new policy differ.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from training.rl.auto_mix import balanced_loss
from training.rl.igrpo import refinement_prompts
from training.rl.objectives import (
    ClipSettings,
    entropy_bonus,
    group_advantages,
    policy_loss,
)
from training.rl.rollout import Rollout, completion_log_probs, sample

GROUP = 8
TASKS_PER_TICK = 16
UPDATES_PER_TICK = 2
ENTROPY_WEIGHT = 0.02
PAD = 0
SEPARATOR = 1
FIRST_SYMBOL = 2


class CopyTask:
    """Prompts of `length` symbols out of `num_symbols`, and what a completion is worth."""

    def __init__(self, *, num_symbols: int, length: int) -> None:
        self.num_symbols = num_symbols
        self.length = length
        self.vocab_size = FIRST_SYMBOL + num_symbols

    def draw(self, rng: random.Random) -> list[int]:
        """`length` symbols and the separator."""
        symbols = range(FIRST_SYMBOL, self.vocab_size)
        return [*(rng.choice(symbols) for _ in range(self.length)), SEPARATOR]

    def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        """Share of the symbols said again in their places, in [0, 1]; what follows them costs
        nothing."""
        wanted = prompt[-self.length - 1 : -1]
        return sum(a == b for a, b in zip(wanted, completion)) / self.length


@dataclass(slots=True, kw_only=True)
class JudgedGroup:
    """Completions, their rewards (N,) and advantages (N,)."""

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor


class CopyLearner:
    """One model and its ticks. placebo: every tick's rewards go to other completions."""

    def __init__(
        self, model: SigmaLLM, task: CopyTask, *, lr: float, seed: int, placebo: bool = False
    ) -> None:
        self.model = model.eval()
        self.task = task
        self.placebo = placebo
        self.num_sampled = 0  # tokens, of training ticks
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def tick(self, blend: Mapping[str, float], *, main: str) -> Tensor:
        """One group for each of some prompts, and updates on them; rewards (N,) of the drafts."""
        prompts = [self.task.draw(self.rng) for _ in range(TASKS_PER_TICK)]
        rows = [prompt for prompt in prompts for _ in range(GROUP)]
        drafts = self._judged(rows, rows)
        groups = dict.fromkeys(blend, drafts)
        if "igrpo" in blend:
            refined = refinement_prompts(
                *(rows, drafts.rollout, drafts.rewards),
                group_size=GROUP,
                stop_ids=(),
                separator=[SEPARATOR],
            )
            groups["igrpo"] = self._judged(refined, rows)
        for _ in range(UPDATES_PER_TICK):
            self._update(groups, blend, main=main)
        return drafts.rewards

    def _update(
        self, groups: Mapping[str, JudgedGroup], blend: Mapping[str, float], *, main: str
    ) -> None:
        scored = {
            id(group): completion_log_probs(self.model, group.rollout) for group in groups.values()
        }
        losses = {
            mode: policy_loss(
                mode,
                log_probs=scored[id(group)][0],
                old_log_probs=group.rollout.old_log_probs,
                advantages=group.advantages,
                mask=group.rollout.completion_mask,
                clip=ClipSettings(),
            ).loss
            for mode, group in groups.items()
        }
        sources = {mode: [scored[id(group)][0]] for mode, group in groups.items()}
        total, _ = balanced_loss(losses, log_probs=sources, blend=blend, main=main)
        for mode, group in groups.items():
            bonus = entropy_bonus(scored[id(group)][1], group.rollout.completion_mask)
            total = total - ENTROPY_WEIGHT * blend[mode] * bonus
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _judged(self, prompts: list[list[int]], tasks: list[list[int]]) -> JudgedGroup:
        rollout = self._sampled(prompts, temperature=1.0, generator=self.generator)
        self.num_sampled += rollout.num_tokens
        said = rollout.token_rows()
        rewards = torch.tensor([self.task.reward(t, c) for t, c in zip(tasks, said)])
        given = rewards
        if self.placebo:
            given = rewards[torch.randperm(len(rewards), generator=self.generator)]
        advantages = group_advantages(given.view(-1, GROUP), normalise=True).flatten()
        return JudgedGroup(rollout=rollout, rewards=rewards, advantages=advantages)

    def accuracy(self, *, number: int = 200, seed: int = 12345) -> float:
        """Mean reward of greedy completions of plain prompts, the same in every call."""
        rng = random.Random(seed)
        prompts = [self.task.draw(rng) for _ in range(number)]
        said = self._sampled(prompts, temperature=0.0, generator=torch.Generator()).token_rows()
        return sum(map(self.task.reward, prompts, said)) / number

    def _sampled(
        self, prompts: list[list[int]], *, temperature: float, generator: torch.Generator
    ) -> Rollout:
        return sample(
            self.model,
            prompts,
            max_new_tokens=self.task.length,
            temperature=temperature,
            top_k=0,
            generator=generator,
            stop_ids=(),
            pad_id=PAD,
        )


def copy_model(task: CopyTask, *, seed: int, **changes: object) -> SigmaLLM:
    """One Mamba and one attention block, dense, in full precision; `changes` go on top."""
    values: dict[str, object] = {
        "vocab_size": task.vocab_size,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "mamba_ratio": 1,
        "d_ff": 48,
        "n_routed_experts": 0,
        "mamba_head_dim": 16,
        "mamba_d_state": 16,
        "mimo_rank": 2,
        "mamba_chunk_len": 8,
        "kv_latent_dim": 16,
        "rope_dim": 8,
        "quant_mode": "none",
    }
    return SigmaLLM(SigmaModelConfig.from_dict(values | changes), seed=seed)
