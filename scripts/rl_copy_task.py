"""The smallest RL loop with every part of a tick: sample, reward, two stages, repeated updates."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from model.sigma_llm import SigmaLLM
from training.rl.igrpo import refinement_prompts
from training.rl.objectives import ClipSettings, entropy_bonus, group_advantages, policy_loss
from training.rl.rollout import Rollout, completion_log_probs, sample

GROUP = 8
TASKS_PER_TICK = 16
UPDATES_PER_TICK = 2  # from the second on, old and new policy differ
ENTROPY_WEIGHT = 0.02
PAD = 0
SEPARATOR = 1
FIRST_SYMBOL = 2
Reward = Callable[[Sequence[int], Sequence[int]], float]


class CopyTask:
    """Prompt: some symbols and a separator; reward: the share of them said again, in place."""

    def __init__(self, *, num_symbols: int, length: int) -> None:
        self.num_symbols = num_symbols
        self.length = length
        self.vocab_size = FIRST_SYMBOL + num_symbols

    def draw(self, rng: random.Random) -> list[int]:
        symbols = range(FIRST_SYMBOL, self.vocab_size)
        return [*(rng.choice(symbols) for _ in range(self.length)), SEPARATOR]

    def reward(self, prompt: Sequence[int], completion: Sequence[int]) -> float:
        wanted = prompt[-self.length - 1 : -1]
        return sum(a == b for a, b in zip(wanted, completion)) / self.length


class Learner:
    """One objective, one model, one task. placebo: every tick's rewards go to other completions."""

    def __init__(
        self,
        model: SigmaLLM,
        task: CopyTask,
        mode: str,
        *,
        lr: float,
        seed: int,
        placebo: bool = False,
    ) -> None:
        self.model = model.eval()
        self.task = task
        self.mode = mode
        self.placebo = placebo
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

    def tick(self) -> float:
        """One group for each of some tasks, and updates on them; the mean reward."""
        prompts = [self.task.draw(self.rng) for _ in range(TASKS_PER_TICK)]
        rows = [prompt for prompt in prompts for _ in range(GROUP)]
        rollout, rewards = self._judged(rows, rows)
        if self.mode == "igrpo":
            refined = refinement_prompts(
                rows, rollout, rewards, group_size=GROUP, stop_ids=(), separator=[SEPARATOR]
            )
            rollout, rewards = self._judged(refined, rows)
        if self.placebo:
            rewards = rewards[torch.randperm(len(rewards), generator=self.generator)]
        advantages = group_advantages(rewards.view(-1, GROUP), normalise=True).flatten()
        for _ in range(UPDATES_PER_TICK):
            log_probs, entropy = completion_log_probs(self.model, rollout)
            term = policy_loss(
                self.mode,
                log_probs=log_probs,
                old_log_probs=rollout.old_log_probs,
                advantages=advantages,
                mask=rollout.completion_mask,
                clip=ClipSettings(),
            )
            loss = term.loss - ENTROPY_WEIGHT * entropy_bonus(entropy, rollout.completion_mask)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return float(rewards.mean())

    def _judged(
        self, prompts: list[list[int]], tasks: list[list[int]]
    ) -> tuple[Rollout, torch.Tensor]:
        rollout = self._sampled(prompts, temperature=1.0)
        said = rollout.token_rows()
        return rollout, torch.tensor([self.task.reward(t, c) for t, c in zip(tasks, said)])

    def accuracy(self, *, number: int = 200) -> float:
        """Mean reward of greedy completions of fresh plain prompts."""
        rng = random.Random(12345)
        prompts = [self.task.draw(rng) for _ in range(number)]
        said = self._sampled(prompts, temperature=0.0).token_rows()
        return sum(map(self.task.reward, prompts, said)) / number

    def _sampled(self, prompts: list[list[int]], *, temperature: float) -> Rollout:
        return sample(
            self.model,
            prompts,
            max_new_tokens=self.task.length,
            temperature=temperature,
            top_k=0,
            generator=self.generator,
            stop_ids=(),
            pad_id=PAD,
        )
