"""What learning from votes does to a policy that is a table: one row of chances per task.

Where the majority is right it becomes sure of the right answer; where it is wrong it becomes sure
of the wrong one if every vote counts, and stays as it is if unclear votes do not. Chance labels
teach nothing.
"""

import random

import pytest
import torch

from training.rl.objectives import ClipSettings, group_advantages, policy_loss
from training.rl.votes import majority_rewards, majority_vote

TASKS, ANSWERS, VOTES, GROUP, TICKS = 32, 8, 64, 8, 60
RIGHT, WRONG = 0, 1
SURE = [0.5, 0.2, *[0.05] * 6]
MISLED = [0.2, 0.32, *[0.08] * 6]


def taught(chances, *, seed, min_share=0.5, drawn=False):
    """Mean chance of the right answer after learning from votes (or drawn rewards)."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    table = torch.tensor(chances).log().repeat(TASKS, 1).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.05)
    for _ in range(TICKS):
        policy = table.detach().softmax(1)
        votes = torch.multinomial(policy, VOTES, replacement=True, generator=generator)
        group, rewards = votes[:, :GROUP], []  # the first ones are as random as any
        for row in votes.tolist():
            vote = majority_vote([str(answer) for answer in row], min_share=min_share)
            rewards.append(majority_rewards([str(answer) for answer in row[:GROUP]], vote))
        if drawn:
            rewards = [[float(rng.random() < 0.5) for _ in row] for row in rewards]
        log_probs = table.log_softmax(1).gather(1, group).view(-1, 1)
        term = policy_loss(
            "cispo",
            log_probs=log_probs,
            old_log_probs=log_probs.detach(),
            advantages=group_advantages(torch.tensor(rewards), normalise=True).flatten(),
            mask=torch.ones(TASKS * GROUP, 1, dtype=torch.bool),
            clip=ClipSettings(),
        )
        optimizer.zero_grad()
        term.loss.backward()
        optimizer.step()
    return float(table.detach().softmax(1)[:, RIGHT].mean())


@pytest.mark.parametrize("seed", range(3))
def test_votes_raise_accuracy_where_the_majority_is_right(seed):
    assert taught(SURE, seed=seed) > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_abstaining_prevents_the_collapse_where_it_is_wrong(seed):
    assert taught(MISLED, seed=seed, min_share=0.0) < 0.1
    assert taught(MISLED, seed=seed) > 0.17


def test_drawn_rewards_teach_nothing():
    ends = [taught(chances, seed=seed, drawn=True) for chances in (SURE, MISLED) for seed in (0, 1)]
    assert ends == pytest.approx([0.5, 0.5, 0.2, 0.2], abs=0.08)
