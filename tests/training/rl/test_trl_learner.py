"""With TRL a tick is TRL's step and nothing else: tasks, levels and looks stay the learner's."""

import pytest
import torch

from tests.training.rl.small_learner import OddBytes, small_learner, weights_of
from training.rl.trl_learner import TrlLearner


class Backend:
    """Says what it was given, and moves every weight by the learning rate if it is to."""

    def __init__(self, learner, *, moves):
        self.learner, self.moves = learner, moves
        self.steps_taken, self.samples, self.seen = 0, [], []

    def update(self, tasks, *, seed, reference=None):
        self.samples = [None] * 3 * len(tasks)
        rates = [group["lr"] for group in self.learner.update.optimizer.param_groups]
        self.seen.append(([task.prompt for task in tasks], seed, rates[0], reference))
        if self.moves:
            self.steps_taken += 1
            with torch.no_grad():
                for param in self.learner.update.model.parameters():
                    param.add_(rates[0])
        return {"grpo_steps": float(self.steps_taken)}

    def state_dict(self):
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state):
        self.steps_taken = state["steps_taken"]


def trl_learner(*, moves=True, **settings):
    learner = small_learner(eval_every=2, eval_tasks=4, **settings)
    return TrlLearner(
        learner,
        Backend(learner, moves=moves),
        num_tasks=3,
        optimizer=learner.update.optimizer,
        lr=0.5,
        verifier=OddBytes(),
        facts={"unsloth_trl_patch_active": 0.0},
    )


def test_a_tick_is_the_back_ends_step_alone():
    still = trl_learner(moves=False)
    before = weights_of(still.learner)
    result = still.tick(seed=1, weight=0.25)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(still.learner)))
    assert result.effects == {"sigma_rl": 0, "verifier": 9}
    assert result.metrics["grpo_steps"] == 0.0
    assert result.metrics["unsloth_trl_patch_active"] == 0.0
    assert not any(name.startswith("sigma_rl_") for name in result.metrics)
    moving = trl_learner()
    assert moving.tick(seed=1, weight=0.25).effects["sigma_rl"] == 1
    assert moving.backend.seen[0][2] == pytest.approx(0.125)


def test_tasks_looks_and_the_reference_are_the_learners():
    own = trl_learner(update={"kl_weight": 0.1})
    looks = [own.tick(seed=seed).metrics["task_val_pass"] for seed in range(4)]
    assert [look == look for look in looks] == [False, True, True, True]  # every second tick
    assert own.learner.num_ticks == own.learner.update.num_ticks == 4
    prompts = [prompt for tasks, *_ in own.backend.seen for prompt in tasks]
    other = small_learner()
    assert prompts == [other.sampler.draw().prompt for _ in range(12)]
    assert all(reference is own.learner.update.reference for *_, reference in own.backend.seen)


def test_a_restored_one_goes_on_as_it_was():
    whole, parted = trl_learner(), trl_learner()
    for seed in range(3):
        whole.tick(seed=seed)
    for seed in range(2):
        parted.tick(seed=seed)
    restored = trl_learner()
    restored.load_state_dict(parted.state_dict())
    restored.tick(seed=2)
    assert restored.backend.seen == whole.backend.seen[2:]
    assert restored.backend.steps_taken == 3
    assert restored.learner.num_ticks == whole.learner.num_ticks
