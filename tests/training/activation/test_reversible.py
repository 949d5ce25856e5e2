"""Inverting `y = x + branch` to the last bit, and blocks that do so in backward."""

import pytest
import torch

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from tests.trainable import patched
from training.activation import reversible
from training.activation.reversible import correct, invert
from training.instant import instant_memory

SHAPE = dict(
    vocab_size=97, d_model=32, n_layers=5, n_heads=2, mamba_ratio=2, attention_ratio=1,
    kv_latent_dim=16, rope_dim=8, mamba_head_dim=16, mamba_d_state=8, mamba_chunk_len=16,
    mimo_rank=2, d_ff=48, n_routed_experts=4, engram_enabled=True, engram_orders=(2, 3),
    engram_heads=2, engram_buckets=64, engram_dim=8, dropout=0.1,
)  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e-3, 1.0, 1e3])
def test_the_inverse_is_exact_whatever_the_sizes(dtype, scale):
    x = (draw(40, 50) * draw(40, 50, seed=1).pow(6) * scale).to(dtype)
    x[0] = 0.0
    branch = draw(40, 50, seed=2).to(dtype)
    y = x + branch
    correction = correct(x, y, branch, max_passes=8)
    assert torch.equal(invert(y, branch, correction, dtype=dtype), x)


def test_a_branch_of_another_dtype_is_no_hindrance():
    x, branch = draw(30, 30), draw(30, 30, seed=1).bfloat16()
    y = x + branch
    assert y.dtype == torch.float32
    found = invert(y, branch, correct(x, y, branch, max_passes=8), dtype=x.dtype)
    assert torch.equal(found, x)


@pytest.mark.parametrize("shape", [(100, 100), (3, 3)])
def test_half_a_byte_per_number_suffices_when_the_stream_is_not_small(shape):
    x, branch = draw(*shape), draw(*shape, seed=1) * 0.3
    y = x + branch
    correction = correct(x, y, branch, max_passes=8)
    assert correction.near.nbytes == -(-x.numel() // 2)
    assert correction.far.nbytes <= 0.05 * x.numel()
    assert correction.index.numel() <= 0.01 * x.numel()
    assert torch.equal(invert(y, branch, correction, dtype=x.dtype), x)


def test_one_pass_may_leave_last_bits_wrong_and_none_would_be_worse():
    x, branch = draw(100, 100) * 1e-3, draw(100, 100, seed=1)
    y = x + branch
    one = invert(y, branch, correct(x, y, branch, max_passes=1), dtype=x.dtype)
    plain = y - branch
    assert not torch.equal(one, x)
    assert (one - x).norm() < (plain - x).norm()
    assert (one - x).abs().max() < 1e-6


def make_model(**changes):
    model = SigmaLLM(SigmaModelConfig(**(SHAPE | changes)).validate(), seed=1).train()
    # Larger branches than at the start, as after some training.
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "step_scale"):
                module.step_scale.fill_(0.7)
    return model


def make_batch(rows=2, length=40, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, length), generator=generator)
    reset = torch.rand(rows, length, generator=generator) < 0.1
    valid = torch.ones_like(reset)
    valid[0, :5] = False
    return ids, reset, valid


def step(model, mode, *, amp=False, rng=5, rows=2, **settings):
    """Loss, gradients, buffers and random state after one forward and backward."""
    patched(model, mode=mode, **settings)
    model.zero_grad()
    ids, reset, valid = make_batch(rows=rows)
    torch.manual_seed(rng)
    with model.weights_held():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            out = model(ids, labels=ids.roll(-1, 1), reset_mask=reset, valid_mask=valid)
        loss = out.loss + sum(out.aux.values())
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients, torch.get_rng_state()


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("changes", [{}, {"n_routed_experts": 0}, {"quant_mode": "none"}])
def test_reversed_blocks_give_the_gradients_to_the_bit(amp, changes):
    """Also with dropout, router noise, resets, padding and statistics counted once.

    The embedding sums three gradients in another order: equal up to fp32 rounding.
    """
    plain, turned = make_model(**changes), make_model(**changes)
    loss, wanted, rng = step(plain, "off", amp=amp)
    found_loss, found, found_rng = step(turned, "reversible", amp=amp)
    assert torch.equal(loss, found_loss) and torch.equal(rng, found_rng)
    for name, gradient in wanted.items():
        if name == "embed.weight":
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(found[name], gradient), name
    after = buffers(turned)
    assert all(torch.equal(after[name], value) for name, value in buffers(plain).items())
    report = instant_memory(turned).finish_step()
    assert report.acted and report.residual == 0.0 and report.passes in (1, 2)


def test_wrong_random_numbers_at_the_replay_would_show(monkeypatch):
    loss, wanted, _ = step(make_model(), "off")
    monkeypatch.setattr(reversible, "_set_rng", lambda state, device: None)
    model = make_model()
    found_loss, found, _ = step(model, "reversible")
    assert torch.equal(loss, found_loss)
    assert any((found[n] - wanted[n]).norm() > 0.01 * wanted[n].norm() for n in wanted)
    with pytest.warns(UserWarning, match="inverse is off"):
        assert instant_memory(model).finish_step().residual > 0.01


def test_plain_subtraction_would_not_do_in_a_ternary_network(monkeypatch):
    """Without the kept bits, rounding differences become other codes and grow with depth.

    A number becomes another code once in 10^5 couplings: 16 rows have some in any case.
    """
    deep = {"n_layers": 12, "dropout": 0.0}
    _, wanted, _ = step(make_model(**deep), "off", rows=16)

    def plain(y, branch, correction, *, dtype):
        return (y - branch).to(dtype)

    monkeypatch.setattr(reversible, "invert", plain)
    model = make_model(**deep)
    _, found, _ = step(model, "reversible", rows=16)
    with pytest.warns(UserWarning, match="inverse is off"):
        assert instant_memory(model).finish_step().residual > 0.01
    assert any((found[n] - wanted[n]).norm() > 0.01 * wanted[n].norm() for n in wanted)


def test_a_second_backward_and_autograd_grad_work():
    model = patched(make_model(dropout=0.0), mode="reversible")
    ids, reset, _ = make_batch()
    loss = model(ids, labels=ids, reset_mask=reset).loss
    names = ["blocks.1.mixer.in_proj.weight", "blocks.3.ffn.experts.down"]
    asked = [model.get_parameter(name) for name in names]
    first = torch.autograd.grad(loss, asked, retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    second = torch.autograd.grad(loss, asked, retain_graph=True)
    loss.backward()
    for parameter, one, two in zip(asked, first, second, strict=True):
        assert torch.equal(one, two) and torch.equal(parameter.grad, one)


def test_frozen_parameters_get_no_gradient_and_others_theirs():
    plain, turned = make_model(dropout=0.0), make_model(dropout=0.0)
    for model in (plain, turned):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".ffn." in name)
    results = []
    for model, mode in ((plain, "off"), (turned, "reversible")):
        patched(model, mode=mode)
        ids, reset, _ = make_batch()
        model(ids, labels=ids, reset_mask=reset).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in results[0].items():
        if gradient is None:
            assert results[1][name] is None
        else:
            assert torch.equal(gradient, results[1][name]), name


def test_a_weight_changed_before_backward_is_an_error():
    model = patched(make_model(), mode="reversible")
    ids, _, _ = make_batch()
    loss = model(ids, labels=ids).loss
    with torch.no_grad():
        model.blocks[1].mixer.in_proj.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()
