"""The columns of one RL tick, from its candidates and its updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.rl.candidates import Candidates
from training.rl.objectives import group_advantages
from training.rl.policy_update import UpdateReport


def diversity(made: Candidates) -> float:
    """Share of distinct completions in a group, mean over groups."""
    shares = [len(set(group.texts)) / len(group.texts) for group in made.groups]
    return mean(shares)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are known; NaN without any."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def tick_metrics(
    made: Candidates, reports: Sequence[UpdateReport], *, majority: bool
) -> dict[str, float]:
    """Columns of the families ttrl and sigma_rl; NaN where a tick has nothing to say.

    raw rewards are verdicts, shaped ones what the verdicts were worth with partial credit; in
    majority mode `ttrl_reward_mean` is agreement with the vote and the other two are the report's.
    """
    groups = made.groups
    votes = [group.vote for group in groups]
    right = [
        float(group.vote.top == group.task.answer) if group.task.answer is not None else math.nan
        for group in groups
    ]
    judged = [judgement for group in groups for judgement in group.judgements]
    raw = mean([float(judgement.passed) for judgement in judged])
    rewards = float(made.rewards.mean())
    row = {
        "ttrl_reward_mean": rewards,
        "ttrl_raw_reward_mean": raw,
        "ttrl_shaped_reward_mean": math.nan if majority else rewards,
        "ttrl_majority_pass": mean(right),
        "ttrl_vote_entropy": mean([vote.entropy for vote in votes]),
        "ttrl_label_accuracy": mean([hit for hit, vote in zip(right, votes) if not vote.abstained]),
        "ttrl_abstain_rate": mean([float(vote.abstained) for vote in votes]),
        "ttrl_confidence": mean([vote.share for vote in votes]),
        "ttrl_diversity_mean": diversity(made),
        "ttrl_domain_math": mean([float(group.task.domain == "math") for group in groups]),
        "ttrl_domain_code": mean([float(group.task.domain == "code") for group in groups]),
        "ttrl_refined_candidates": float(made.num_refined),
        "ttrl_asym_candidate_pool": mean([float(g.kept_out + g.verified) for g in groups]),
        "ttrl_asym_verified_candidates": mean([float(group.verified) for group in groups]),
        "ttrl_asym_discriminative_mean": made.scores_mean,
        "ttrl_asym_recall_at_k": mean([group.recall for group in groups]),
    }
    return row | update_metrics(made, reports)


def update_metrics(made: Candidates, reports: Sequence[UpdateReport]) -> dict[str, float]:
    """Columns of the family sigma_rl; those of updates are means over the tick's repeats."""
    advantages = group_advantages(made.rewards, normalise=True)
    row = {
        "sigma_rl_adv_mean": float(advantages.mean()),
        "sigma_rl_adv_abs_mean": float(advantages.abs().mean()),
        "sigma_rl_policy_grad_norm": mean([r.policy_norm for r in reports]) if reports else 0.0,
        "sigma_rl_grad_norm": mean([report.grad_norm for report in reports]),
        "ttrl_online_loss": mean([report.loss for report in reports]),
        "sigma_rl_ratio": mean([report.ratio for report in reports]),
        "sigma_rl_ratio_clip_fraction": mean([report.clip_fraction for report in reports]),
        "sigma_rl_kl": mean([report.kl for report in reports]),
        "sigma_rl_entropy": mean([report.entropy for report in reports]),
    }
    for mode in ("igrpo", "dispo", "gspo", "cispo"):
        losses = [report.components.get(mode, math.nan) for report in reports]
        row[f"sigma_rl_component_{mode}_loss"] = mean(losses)
    return row
