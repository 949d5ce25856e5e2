"""The scan against the Mamba-2 mixer of transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ssd import ScanInputs, mamba_scan


class _Ungated(torch.nn.Module):
    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        return hidden


def test_mamba2_of_transformers_is_the_scan_without_trapezoid_and_rotation():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    heads, width, size, length = 4, 8, 16, 75
    config = Mamba2Config(
        num_heads=heads, head_dim=width, state_size=size, n_groups=1, hidden_size=heads * width,
        expand=1, chunk_size=32, conv_kernel=4, use_conv_bias=False, hidden_act="silu",
    )  # fmt: skip
    mixer = modeling.Mamba2Mixer(config, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # the convolution, both projections, gate and norm become identities
        mixer.conv1d.weight.zero_()[:, :, -1] = 1.0
        mixer.A_log.copy_(torch.randn(heads, generator=generator))
        mixer.dt_bias.zero_()
        mixer.D.copy_(torch.randn(heads, generator=generator))
    mixer.act = torch.nn.Identity()
    mixer.in_proj = mixer.out_proj = torch.nn.Identity()
    mixer.norm = _Ungated()
    gate, x = torch.randn(2, 2, length, heads * width, generator=generator)
    b, c = torch.randn(2, 2, length, size, generator=generator)
    raw_dt = torch.randn(2, length, heads, generator=generator)
    with torch.no_grad():
        expected = mixer.torch_forward(torch.cat([gate, x, b, c, raw_dt], -1))
        dt = F.softplus(raw_dt)
        inputs = ScanInputs(
            x=x.view(2, length, heads, width), b=b.unsqueeze(2), c=c.unsqueeze(2),
            dt=dt, log_decay=-dt * mixer.A_log.exp(), skip=mixer.D,
        )  # fmt: skip
        y, _ = mamba_scan(inputs, chunk_len=16)
    assert (y.flatten(2) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert float(expected.abs().max()) > 1.0
