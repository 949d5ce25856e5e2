"""Labels without ground truth: what most completions of a task answer (TTRL, 2504.16084).

Where the majority is wrong, learning from it makes the model surer of a wrong answer. So a vote
without a clear winner is no label: with fewer than three parsed answers, or less than half of them
for the first, it abstains and the group earns nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MIN_PARSED = 3
MIN_SHARE = 0.5


@dataclass(slots=True, kw_only=True, frozen=True)
class Vote:
    """The result of one vote; `label` is None when it abstains.

    share: votes of the top answer over all parsed ones. entropy: of the parsed answers, in nats.
    """

    label: str | None
    top: str | None
    share: float
    entropy: float
    counts: dict[str, int]

    @property
    def abstained(self) -> bool:
        return self.label is None


def majority_vote(
    answers: Sequence[str | None], *, min_parsed: int = MIN_PARSED, min_share: float = MIN_SHARE
) -> Vote:
    """The vote of one task's canonical answers (`Judgement.answer`, or `extract_answer`).

    Two answers that share the first place are no majority, whatever their share.
    """
    parsed = [answer for answer in answers if answer is not None]
    ranked = Counter(parsed).most_common()
    if not ranked:
        return Vote(label=None, top=None, share=0.0, entropy=0.0, counts={})
    top, votes = ranked[0]
    shares = [count / len(parsed) for _, count in ranked]
    tied = len(ranked) > 1 and ranked[1][1] == votes
    clear = len(parsed) >= min_parsed and shares[0] >= min_share and not tied
    return Vote(
        label=top if clear else None,
        top=None if tied else top,
        share=shares[0],
        entropy=-sum(share * math.log(share) for share in shares),
        counts=dict(ranked),
    )


def majority_rewards(answers: Sequence[str | None], vote: Vote) -> list[float]:
    """1 for the majority's answer, 0 for others and for none; all 0 when the vote abstained."""
    return [float(answer is not None and answer == vote.label) for answer in answers]
