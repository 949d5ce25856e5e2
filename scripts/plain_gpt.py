"""A plainly written GPT, the peer that SigmaLLM is compared with. Shares no code with model/.

Pre-norm blocks of rotary attention (Su et al. 2021) and a SwiGLU (Shazeer 2020), RMSNorm, tied
embeddings, no biases: what a careful practitioner writes today without special mechanisms. Rows
hold several documents; attention never crosses from one into another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True, kw_only=True)
class PlainGPTConfig:
    """d_ff 0 = the usual 8/3 of d_model, rounded up to a multiple of 32."""

    vocab_size: int
    d_model: int = 256
    layers: int = 6
    heads: int = 4
    d_ff: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.d_model % self.heads or (self.d_model // self.heads) % 2:
            raise ValueError("--d-model must be an even multiple of --heads")
        if self.d_ff == 0:
            self.d_ff = 32 * math.ceil(8 * self.d_model / 3 / 32)


@dataclass(slots=True)
class PlainOutput:
    """logits (B, T, V) without labels; with labels, loss: the mean nats of those not -100."""

    logits: Tensor | None = None
    loss: Tensor | None = None


class PlainGPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, config: PlainGPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self._initialize(torch.Generator().manual_seed(seed))

    def forward(
        self, input_ids: Tensor, *, reset_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> PlainOutput:
        """input_ids (B, T); reset_mask (B, T) True where a document starts; labels (B, T)."""
        mask = document_mask(reset_mask)
        rotation = rotary_table(
            input_ids.shape[1],
            width=self.config.d_model // self.config.heads,
            theta=self.config.rope_theta,
            device=input_ids.device,
        )
        hidden = self.embed(input_ids)  # (B, T, D)
        for block in self.blocks:
            hidden = block(hidden, rotation=rotation, mask=mask)
        logits = F.linear(self.norm(hidden), self.embed.weight)  # (B, T, V)
        if labels is None:
            return PlainOutput(logits=logits)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return PlainOutput(loss=loss)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialize(self, generator: torch.Generator) -> None:
        """N(0, 0.02); what is added to the residual stream is scaled by depth (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised residual stream."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, *, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation=rotation, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, *, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: PlainGPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def document_mask(reset_mask: Tensor | None) -> Tensor | None:
    """(B, 1, T, T), True where a query may look: backwards, within its document."""
    if reset_mask is None:
        return None
    document = reset_mask.long().cumsum(dim=1)  # (B, T)
    same = document.unsqueeze(2) == document.unsqueeze(1)
    return same.tril().unsqueeze(1)


def rotary_table(
    length: int, *, width: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, width / 2)."""
    powers = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), theta**-powers)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (first half, second half) of x (B, H, T, width) by their positions."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
