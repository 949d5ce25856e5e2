"""The plan's figures against the model it describes and against hand counts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.training.hydra.test_learner import SETTINGS, make_hydra, run
from tests.training.rl.small_learner import small_model
from training.build import build_model
from training.build_data import build_tokenizer
from training.config.cli import parse_args
from training.modes import plan
from training.modes.plan import SavedTensors
from training.runtime.environment import EnvironmentProblem

CPU = torch.device("cpu")
TINY = (
    "--mode plan --no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k "
    "--d-model 64 --n-heads 2 --n-layers 2 --mamba-ratio 1 --d-ff 96 --rope-dim 8 "
    "--kv-latent-dim 16 --mamba-d-state 8 --mamba-head-dim 32 --mimo-rank 1 --seq-len 32 "
    "--mamba-chunk-len 16 --batch-size 2 --grad-accum-steps 3 --steps 1000 --instant-mode off"
).split()


@pytest.fixture(scope="module")
def measured():
    config = parse_args([*TINY, "--ema-enabled"])
    return config, plan.measure(config, CPU)


def test_memory_terms_are_those_of_the_built_model(measured):
    config, result = measured
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer, CPU)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert result.parameters_total == model.num_parameters()["total"]
    assert result.parameters_active <= result.parameters_total
    assert result.weight_bytes == 4 * parameters + buffers
    assert result.gradient_bytes == result.average_bytes == 4 * parameters
    assert 4 * parameters < result.optimizer_bytes < 8 * parameters + 4096
    saved = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    total = saved + result.optimizer_bytes + result.average_bytes
    assert result.checkpoint_bytes == total
    assert result.checkpoints_bytes == total * (config.run.max_checkpoints + 1)
    assert result.activation_bytes > 0 and result.peak_bytes is None


def test_time_follows_from_three_measured_steps(measured):
    _, result = measured
    assert len(result.micro_step_s) == len(result.optimizer_step_s) == 3
    micro, update = sorted(result.micro_step_s)[1], sorted(result.optimizer_step_s)[1]
    assert result.step_s == pytest.approx(3 * micro + update)
    assert result.tokens_per_step == 2 * 32 * 3
    assert result.tokens_per_s == pytest.approx(result.tokens_per_step / result.step_s)
    assert result.total_s == pytest.approx(1000 * result.step_s)
    assert result.total_tokens == 1000 * result.tokens_per_step


def test_reinforcement_learning_has_its_place_in_the_plan(measured):
    _, plain = measured
    rl = "--ttrl-interval 2 --no-verifier-code-enabled --ttrl-max-new-tokens 3".split()
    result = plan.measure(parse_args([*TINY, "--ema-enabled", *rl]), CPU)
    learned = result.gradient_bytes  # of the parameters; RL keeps two moments and a reference
    assert 3 * learned <= result.rl_bytes < 3 * learned + 2**16
    assert result.checkpoint_bytes == plain.checkpoint_bytes + result.rl_bytes
    micro, update = sorted(result.micro_step_s)[1], sorted(result.optimizer_step_s)[1]
    assert result.step_s == pytest.approx(3 * micro + update + result.rl_tick_s / 2)
    rows = dict(plan.plan_rows(result))
    assert {"memory, reinforcement learning", "RL tick"} <= rows.keys()
    assert not {"memory, reinforcement learning", "RL tick"} & dict(plan.plan_rows(plain)).keys()


def test_adapters_are_counted_as_a_learner_keeps_them():
    """Against a learner that has stepped in both domains, kept both as best and merged them."""
    hydra = make_hydra()
    run(hydra, 4)
    for domain in hydra.domains.values():
        assert domain.version > 0
        domain.keep_as_best()
    rank = ["--hydra-lora-rank", str(SETTINGS.adapter.rank)]
    flags = [*TINY, "--hydra-enable", "--hydra-domains", "math,text", *rank]
    unmerged = parse_args([*flags, "--hydra-steps-per-phase", "0"])
    assert plan.measure_hydra(unmerged, small_model()) == _tensor_bytes(hydra.state_dict())
    hydra.merge(seed=0)
    kept = plan.measure_hydra(parse_args(flags), small_model())
    assert kept == _tensor_bytes(hydra.state_dict()) > 0
    assert plan.measure_hydra(parse_args(TINY), small_model()) == 0


def _tensor_bytes(tree):
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    children = tree.values() if isinstance(tree, dict) else tree
    return sum(map(_tensor_bytes, children)) if isinstance(tree, dict | list | tuple) else 0


def test_adapters_have_their_place_in_the_plan(measured):
    _, plain = measured
    result = plan.measure(parse_args([*TINY, "--ema-enabled", "--hydra-enable"]), CPU)
    assert result.hydra_bytes > 0 == plain.hydra_bytes
    assert result.checkpoint_bytes == plain.checkpoint_bytes + result.hydra_bytes
    assert "memory, adapters per domain" in dict(plan.plan_rows(result))
    assert "memory, adapters per domain" not in dict(plan.plan_rows(plain))


def test_activations_grow_with_the_batch_and_the_rest_does_not(measured):
    config, small = measured
    plans = [
        plan.measure(parse_args([*TINY, "--ema-enabled", "--batch-size", size]), CPU)
        for size in ("4", "8")
    ]
    # Besides what each row keeps, a step keeps its quantised weights, whatever the batch.
    per_row = (plans[0].activation_bytes - small.activation_bytes) / 2
    assert plans[1].activation_bytes - plans[0].activation_bytes == pytest.approx(
        4 * per_row, rel=0.1
    )
    assert per_row > 4 * config.data.seq_len * config.model.d_model * config.model.n_layers
    for other in plans:
        assert other.weight_bytes == small.weight_bytes
        assert other.optimizer_bytes == small.optimizer_bytes


@pytest.mark.parametrize("mode", ["reversible", "compress"])
def test_activations_are_those_that_instant_keeps(mode):
    wide = ["--batch-size", "8", "--seq-len", "128"]
    kept = plan.measure(parse_args([*TINY, *wide, "--instant-mode", mode]), CPU).activation_bytes
    all_of_them = plan.measure(parse_args([*TINY, *wide]), CPU).activation_bytes
    assert 0 < kept < 0.6 * all_of_them


def test_saved_tensors_are_counted_once_and_without_parameters():
    model = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with SavedTensors(model) as saved:
        hidden = model(x)  # saves x and the weight
        (hidden.tanh() * 2.0 + hidden.exp()).sum().backward()  # saves both results
    assert saved.num_bytes == 4 * (4 * 8 + 2 * 4 * 16)


def test_saved_tensors_sees_nothing_after_its_end():
    with SavedTensors(nn.Linear(2, 2)) as saved:
        pass
    torch.randn(4, requires_grad=True).exp().sum().backward()
    assert saved.num_bytes == 0


def test_a_plan_is_printed_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan.run(parse_args([*TINY, "--json"])) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["steps"] == 1000 and values["average_bytes"] == 0
    assert plan.run(parse_args(TINY)) == 0
    text = capsys.readouterr().out
    for name in ("parameters: ", "memory, activations of a micro-batch: ", "speed: ", "disk: "):
        assert name in text
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_fit_says_what_to_lower(monkeypatch):
    def exhaust(config, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has")

    monkeypatch.setattr(plan, "measure", exhaust)
    with pytest.raises(EnvironmentProblem, match=r"does not fit on cpu: CUDA out of.*--batch-size"):
        plan.run(parse_args(TINY))


def test_what_cannot_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(plan, "build_model", None)  # not called
    with pytest.raises(EnvironmentProblem, match=r"does not fit on cpu: 0.0 GiB of memory free"):
        plan.run(parse_args(TINY))
