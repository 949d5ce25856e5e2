"""Each objective alone, from a fresh policy: a bandit, and a copy task of a real small model."""

from __future__ import annotations

import pytest
import torch

from scripts.rl_copy_task import CopyLearner, CopyTask, copy_model
from training.rl.objectives import MODES, ClipSettings, group_advantages, policy_loss

ARMS = 10
GROUP = 8
GOAL = 0.95


class Bandit:
    """A policy over arms that pay 1, 0.5 or 0; igrpo's second draw sees which arm was best."""

    def __init__(self, mode: str, *, seed: int) -> None:
        self.mode = mode
        self.generator = torch.Generator().manual_seed(seed)
        self.table = torch.zeros(ARMS, requires_grad=True)
        self.of_draft = torch.zeros(ARMS, requires_grad=True)
        self.pay = torch.zeros(ARMS)
        self.pay[[3, 7]] = torch.tensor([0.5, 1.0])
        self.optimizer = torch.optim.Adam([self.table, self.of_draft], lr=0.1)

    def log_policy(self, draft: int | None) -> torch.Tensor:
        logits = self.table
        if draft is not None:
            logits = logits + self.of_draft * (torch.arange(ARMS) == draft)
        return logits.log_softmax(0)

    def draw(self, draft: int | None = None) -> torch.Tensor:
        policy = self.log_policy(draft).detach().exp()
        return torch.multinomial(policy, GROUP, replacement=True, generator=self.generator)

    def tick(self) -> None:
        """One group, two updates."""
        arms, draft = self.draw(), None
        if self.mode == "igrpo":
            draft = int(arms[self.pay[arms].argmax()])
            arms = self.draw(draft)
        advantages = group_advantages(self.pay[arms].unsqueeze(0), normalise=True)[0]
        old = self.log_policy(draft)[arms].detach().unsqueeze(1)
        for _ in range(2):
            term = policy_loss(
                self.mode,
                log_probs=self.log_policy(draft)[arms].unsqueeze(1),
                old_log_probs=old,
                advantages=advantages,
                mask=torch.ones(GROUP, 1, dtype=torch.bool),
                clip=ClipSettings(),
            )
            self.optimizer.zero_grad()
            term.loss.backward()
            self.optimizer.step()

    def expected_reward(self) -> float:
        return float((self.log_policy(None).detach().exp() * self.pay).sum())


@pytest.mark.parametrize("mode", MODES)
def test_each_objective_solves_a_bandit(mode):
    """From 0.15, on every one of 5 seeds."""
    for seed in range(5):
        bandit = Bandit(mode, seed=seed)
        assert bandit.expected_reward() == pytest.approx(0.15)
        for _ in range(150):
            bandit.tick()
        assert bandit.expected_reward() > GOAL


def copying(*, seed: int = 0, placebo: bool = False, **changes) -> CopyLearner:
    task = CopyTask(num_symbols=5, length=2)
    model = copy_model(task, seed=seed, **changes)
    return CopyLearner(model, task, lr=1e-3, seed=seed, placebo=placebo)


def learned(learner: CopyLearner, mode: str, *, ticks: int) -> float:
    """Greedy accuracy, at the latest after `ticks`; it is looked at every ten."""
    accuracy = 0.0
    for tick in range(1, ticks + 1):
        learner.tick({mode: 1.0}, main=mode)
        if tick % 10 == 0:
            accuracy = learner.accuracy()
            if accuracy > GOAL:
                break
    return accuracy


@pytest.mark.parametrize("mode", MODES)
def test_each_objective_teaches_a_model_to_copy(mode):
    """Mamba and latent attention from fresh weights; saying one symbol gives 0.2."""
    assert learned(copying(), mode, ticks=150) > GOAL


def test_rewards_of_other_completions_teach_nothing():
    assert learned(copying(placebo=True), "grpo", ticks=60) < 0.35


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_ternary_model_with_experts_learns_to_copy_too(mode, seed):
    """All kinds of blocks, ternary weights and rounded activations."""
    changes = {
        "n_layers": 3,
        "n_routed_experts": 4,
        "mamba_ratio": 2,
        "engram_enabled": True,
        "engram_buckets": 61,
        "engram_dim": 8,
        "quant_mode": "bitnet_1_58",
    }
    assert learned(copying(seed=seed, **changes), mode, ticks=400) > GOAL
