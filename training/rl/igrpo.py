"""The two stages of iGRPO: the best of a group of drafts goes into the prompt of the next group.

Stage 1 samples a group per task as any objective does. Stage 2 reads the task, its best draft and
the task again, and samples a group of refinements, on which GRPO acts (mode "igrpo"). The task
stands last, so a completion begins where it does without a draft; no gradient flows to the drafts.

Source: iGRPO 2602.09000.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from training.rl.rollout import Rollout


def best_drafts(rewards: Tensor, mean_log_probs: Tensor) -> Tensor:
    """(groups,) int64: the place of the best draft in each group; both arguments (groups, G).

    The highest reward, among equals the likeliest, among those the first.
    """
    best = rewards == rewards.amax(1, keepdim=True)
    return mean_log_probs.masked_fill(~best, -torch.inf).argmax(1)


def refinement_prompts(
    prompts: Sequence[Sequence[int]],
    drafts: Rollout,
    rewards: Sequence[float] | Tensor,
    *,
    group_size: int,
    stop_ids: Sequence[int],
    separator: Sequence[int],
) -> list[list[int]]:
    """For every row of `drafts` the prompt of its refinement: task, best draft, separator, task.

    prompts, drafts and rewards are in the same order, the rows of a group side by side. A stop
    token at the draft's end is left out.
    """
    if len(drafts) % group_size or not len(prompts) == len(rewards) == len(drafts):
        raise ValueError("drafts come in whole groups, with a prompt and a reward for each row")
    shape = (-1, group_size)
    values = torch.as_tensor(rewards, dtype=torch.float64).cpu().view(shape)
    places = best_drafts(values, drafts.mean_log_probs().cpu().double().view(shape)).tolist()
    said = drafts.token_rows(stop_ids=stop_ids)
    result = []
    for row, prompt in enumerate(prompts):
        group = row // group_size
        draft = said[group * group_size + places[group]]
        result.append([*prompt, *draft, *separator, *prompt])
    return result
