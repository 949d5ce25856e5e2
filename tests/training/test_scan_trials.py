"""Trials of the scan: every arm is one function, a wrong one is seen, training is untouched."""

import pytest
import torch

from model.config import SigmaModelConfig
from model.mamba import Mamba
from model.ssd import mamba_scan
from tests.tiny_model import tiny_config
from training import scan_trials
from training.scan_trials import REPEATS, TOLERANCE, ScanTrials, use_arm


def mixer(**changes) -> Mamba:
    torch.manual_seed(0)
    config: SigmaModelConfig = tiny_config(mamba_chunk_len=64, **changes)
    return Mamba(config)


def trials_of(own: Mamba, *, length: int = 48, now=None) -> ScanTrials:
    more = {} if now is None else {"now": now}
    return ScanTrials(own, rows=2, length=length, in_bf16=False, **more)


def test_arms_are_the_chunks_that_fit_and_the_default_is_first():
    assert trials_of(mixer(), length=48).arms == [(64,), (16,), (32,)]
    assert trials_of(mixer(), length=256).arms == [(64,), (16,), (32,), (128,), (256,)]


@pytest.mark.parametrize(
    "changes", [{"mimo_rank": 1}, {"mimo_rank": 2, "quant_mode": "bitnet_1_58"}]
)
def test_every_chunk_length_is_the_same_function(changes):
    trials = trials_of(mixer(**changes))
    errors = {arm: trials.error(arm) for arm in trials.arms}
    assert max(errors.values()) < TOLERANCE / 3, errors


def test_a_wrong_arm_is_seen_by_its_values_or_its_gradients(monkeypatch):
    trials = trials_of(mixer())

    def late(inputs, *, chunk_len, **more):
        y, state = mamba_scan(inputs, chunk_len=chunk_len, **more)
        return (y * 1.001 if chunk_len == 16 else y), state

    def without_gradient(inputs, *, chunk_len, **more):
        y, state = mamba_scan(inputs, chunk_len=chunk_len, **more)
        if chunk_len == 16:
            y = y + 0.01 * (inputs.b.sum() - inputs.b.sum().detach())
        return y, state

    for wrong in (late, without_gradient):
        monkeypatch.setattr(scan_trials, "mamba_scan", wrong)
        assert trials.error((16,)) > TOLERANCE > trials.error((32,))


def test_the_latency_is_the_median_and_the_first_run_does_not_count():
    ticks = iter([0.0, 1e-3] * 5 + [0.0, 9e-3] * 4 + [0.0, 2e-3] * (REPEATS - 9))
    found = trials_of(mixer(), now=lambda: next(ticks)).latency((16,))
    assert found == pytest.approx(2e3)
    assert next(ticks, None) is None


def test_a_trial_leaves_random_numbers_gradients_and_the_mixer_alone():
    own = mixer()
    before = torch.get_rng_state()
    trials = trials_of(own)
    trials.latency((32,))
    trials.error((16,))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in own.parameters())
    assert own.chunk_len == 64 and own.blocks == (0, 0)


def test_keys_tell_shapes_backends_and_types_apart():
    own = mixer()
    keys = {trials_of(own).key, trials_of(own, length=64).key, trials_of(mixer(mimo_rank=1)).key}
    keys.add(ScanTrials(own, rows=2, length=48, in_bf16=True).key)
    own.backend = "triton"
    keys.add(trials_of(own).key)
    assert len(keys) == 5


def test_tiles_of_the_kernels_are_the_same_function_and_reach_them(monkeypatch):
    pytest.importorskip("triton")
    from model import sigma_kernels
    from tests.model.kernel_inputs import Recorded

    own = mixer(mimo_rank=1)
    own.backend = "triton"
    trials = trials_of(own, length=40)
    assert trials.arms == [(0, 0), (16, 16), (32, 16), (64, 16)]
    seen: list[dict[str, int]] = []
    for name in ("chunk_scores_kernel", "scan_outputs_kernel", "input_gradient_kernel"):
        recorded = Recorded(getattr(sigma_kernels, name), seen)
        monkeypatch.setattr(sigma_kernels, name, recorded)
    for arm in trials.arms[1:]:
        seen.clear()
        assert trials.error(arm) < TOLERANCE
        assert {constants["BLOCK_T"] for constants in seen} == {arm[0]}
        use_arm(own, arm)
        assert own.blocks == arm
