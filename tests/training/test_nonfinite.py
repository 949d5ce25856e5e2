"""The guard's policy: skip, skip, roll back; give up only when rolling back does not help."""

import pytest

from training.nonfinite import NonFiniteGuard, Verdict


def test_two_skips_then_a_rollback():
    guard = NonFiniteGuard()
    verdicts = [guard.judge(finite=False, step=7, position={"window": i}) for i in range(3)]
    assert verdicts == [Verdict.SKIP, Verdict.SKIP, Verdict.ROLL_BACK]
    assert [entry["position"]["window"] for entry in guard.skipped] == [0, 1, 2]


def test_a_good_step_forgives():
    guard = NonFiniteGuard()
    for _ in range(20):
        assert guard.judge(finite=False, step=1, position={}) is Verdict.SKIP
        assert guard.judge(finite=True, step=1, position={}) is Verdict.APPLY


def test_endless_failure_ends_the_run():
    guard = NonFiniteGuard()
    with pytest.raises(RuntimeError, match="--lr"):
        for _ in range(12):
            guard.judge(finite=False, step=3, position={})
