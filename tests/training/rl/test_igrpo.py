"""iGRPO's two stages: which draft is taken, and what the second prompt says."""

from __future__ import annotations

import pytest
import torch

from tests.training.rl.small_model import PAD, STOPS, small_model
from training.rl.igrpo import best_drafts, refinement_prompts
from training.rl.rollout import Rollout, sample


def drafts_of(rows: list[list[int]], mean_log_probs: list[float]) -> Rollout:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths.unsqueeze(1)
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    log_probs = torch.tensor(mean_log_probs).unsqueeze(1).expand(-1, width)
    return Rollout(
        prompt_ids=torch.ones(len(rows), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        completion_ids=ids,
        completion_mask=mask,
        old_log_probs=log_probs * mask,
        temperature=1.0,
        top_k=0,
    )


def test_the_highest_reward_wins_then_the_likeliest_then_the_first():
    rewards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    log_probs = torch.tensor([[-0.1, -9.0, -0.1], [-2.0, -0.1, -1.0], [-1.0, -1.0, -3.0]])
    assert best_drafts(rewards, log_probs).tolist() == [1, 2, 0]


def test_the_task_its_best_draft_and_the_task_again():
    drafts = drafts_of([[11, 5], [12, 13, 7], [14], [15, 16, 5]], [-1.0, -2.0, -3.0, -0.5])
    prompts = [[1, 2], [1, 2], [3], [3]]
    found = refinement_prompts(
        prompts, drafts, [0.0, 1.0, 0.3, 0.3], group_size=2, stop_ids=STOPS, separator=[9]
    )
    first, second = [1, 2, 12, 13, 9, 1, 2], [3, 15, 16, 9, 3]
    assert found == [first, first, second, second]


def test_refinements_of_a_group_are_sampled_from_one_prompt():
    model = small_model()
    settings = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "stop_ids": STOPS}
    generator = torch.Generator().manual_seed(0)
    prompts = [[3, 4]] * 4 + [[8]] * 4
    drafts = sample(model, prompts, generator=generator, pad_id=PAD, **settings)
    rewards = torch.rand(8, generator=generator)
    refined = refinement_prompts(
        prompts, drafts, rewards, group_size=4, stop_ids=STOPS, separator=[2]
    )
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    result = sample(model, refined, generator=generator, pad_id=PAD, **settings)
    assert sizes[0] == 2 and len(result) == 8
    for row, prompt in enumerate(refined):
        assert result.prompt_ids[row][result.prompt_mask[row]].tolist() == prompt


def test_rows_that_do_not_fit_are_refused():
    drafts = drafts_of([[11], [12], [13]], [-1.0, -1.0, -1.0])
    settings = {"stop_ids": STOPS, "separator": [9]}
    with pytest.raises(ValueError, match="whole groups"):
        refinement_prompts([[1]] * 3, drafts, [0.0] * 3, group_size=2, **settings)
    with pytest.raises(ValueError, match="whole groups"):
        refinement_prompts([[1]] * 3, drafts, [0.0] * 2, group_size=3, **settings)
