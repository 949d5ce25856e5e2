"""The plain twin is the same network: equal losses and gradients from equal weights."""

import pytest
import torch

from scripts.bench_models import token_model
from scripts.plain_sigma import PlainSigma

FLAGS = (
    "--d-model=48", "--n-heads=2", "--kv-latent-dim=16", "--d-ff=96", "--engram-buckets=128",
    "--engram-dim=8", "--mamba-head-dim=16", "--mamba-d-state=16", "--mamba-chunk-len=16",
)  # fmt: skip


def twins(*more: str, **changes):
    """Ours and the plain one, with weights that let every part act, and rows of several texts."""
    model = token_model(torch.device("cpu"), *FLAGS, *more, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv_weight", "control_proj.weight", "gate_lambda.weight")):
                parameter.normal_(std=0.1, generator=generator)
    ids = torch.randint(0, 4096, (2, 64), generator=generator)
    labels = torch.randint(0, 4096, (2, 64), generator=generator)
    starts = torch.rand(2, 64, generator=generator) < 0.1
    return model.train(), PlainSigma(model.config, model.state_dict()).train(), ids, labels, starts


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--residual-layout=standard", "--no-engram-enabled"),
        ("--n-routed-experts=0", "--no-diff-attention-enabled"),
    ],
)
def test_loss_and_every_gradient_agree_in_full_precision(flags):
    model, plain, ids, labels, starts = twins(*flags, quant_mode="none")
    output = model(ids, reset_mask=starts, labels=labels)
    (output.loss + sum(output.aux.values())).backward()
    ours = output.loss
    theirs = plain(ids, reset_mask=starts, labels=labels)
    (theirs.loss + theirs.aux).backward()
    torch.testing.assert_close(theirs.loss, ours, atol=1e-5, rtol=0)
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        error = (gradients[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, name


def test_the_ternary_loss_agrees_but_for_rounding():
    """A last-bit difference can move an activation by an int8 step."""
    model, plain, ids, labels, starts = twins()
    with torch.no_grad():
        ours = model(ids, reset_mask=starts, labels=labels).loss
        theirs = plain(ids, reset_mask=starts, labels=labels).loss
    torch.testing.assert_close(theirs, ours, atol=5e-3, rtol=0)


def test_another_network_is_another_loss():
    """The comparison would notice: the twin without its document borders."""
    model, plain, ids, labels, starts = twins(quant_mode="none")
    with torch.no_grad():
        ours = model(ids, reset_mask=starts, labels=labels).loss
        other = plain(ids, reset_mask=torch.zeros_like(starts), labels=labels).loss
    assert abs(float(ours - other)) > 1e-4


def test_settings_the_twin_lacks_are_refused():
    model = token_model(torch.device("cpu"), *FLAGS)
    for name, value in (("mimo_rank", 2), ("dropout", 0.1), ("router_jitter_noise", 0.01)):
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match="the plain twin"):
            PlainSigma(model.config, model.state_dict())
        setattr(model.config, name, {"mimo_rank": 1}.get(name, 0.0))
