"""The guard's policy: skip, skip, roll back; give up only when rolling back does not help."""

import pytest
import torch

from training.nonfinite import NonFiniteGuard, Verdict, state_is_finite
from training.optimizer import OptimizerSet


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


def test_rollbacks_that_helped_are_forgiven():
    """Weeks bring more than three accidents; only those without progress between them count."""
    guard = NonFiniteGuard()
    for step in range(10, 500, 10):
        assert guard.judge_state(finite=False, step=step) is Verdict.RESTORE
        for again in range(step - 5, step + 2):
            assert guard.judge(finite=True, step=again, position={}) is Verdict.APPLY
    with pytest.raises(RuntimeError, match="step 500"):
        for _ in range(4):
            guard.judge_state(finite=False, step=500)
            for again in range(495, 501):  # as far as before, and no further
                guard.judge(finite=True, step=again, position={})


def test_damaged_weights_are_restored_once_and_then_get_new_data():
    guard = NonFiniteGuard()
    assert guard.judge_state(finite=True, step=5) is Verdict.APPLY
    assert guard.judge_state(finite=False, step=5) is Verdict.RESTORE
    assert guard.judge_state(finite=False, step=5) is Verdict.ROLL_BACK
    assert guard.judge_state(finite=False, step=6) is Verdict.RESTORE
    assert guard.skipped == []
    with pytest.raises(RuntimeError, match="--lr"):
        guard.judge_state(finite=False, step=6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_element_anywhere_is_seen(value):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.BatchNorm1d(5))
    optimizer = OptimizerSet([torch.optim.AdamW(model.parameters())])
    model(torch.randn(4, 7)).sum().backward()
    optimizer.step()
    assert state_is_finite(model, optimizer)
    moments = [v for s in optimizer.parts[0].state.values() for v in s.values() if v.dim()]
    tensors = [*model.parameters(), *moments, model[1].running_mean]
    for tensor in tensors:
        for place in range(tensor.numel()):
            flat = tensor.data.view(-1)
            before, flat[place] = flat[place].clone(), value
            assert not state_is_finite(model, optimizer)
            flat[place] = before
    assert state_is_finite(model, optimizer)
