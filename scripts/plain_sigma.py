"""SigmaLLM written plainly in PyTorch: the peer whose speed SIGMA's is measured against.

The same network, parameter for parameter: names and shapes are SigmaLLM's, so its `state_dict`
loads as it is and the loss must come out the same. Written as a careful author writes a first
version: fake quantisation around `F.linear` (BitNet b1.58's published recipe), torch's RMSNorm and
scaled_dot_product_attention, the chunked scan by `segsum` and einsum (Mamba-2's published minimal
form, not a loop over time), one masked pass per expert, logits in one piece. No code of model/ is
used; only its configuration is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import SigmaModelConfig


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Ternary with the least-squares scale per row, straight-through; (..., out, in)."""
    codes = (weight / (weight.abs().mean(-1, keepdim=True) + 1e-12)).round().clamp(-1, 1)
    scale = (weight * codes).sum(-1, keepdim=True) / codes.abs().sum(-1, keepdim=True).clamp_min(1)
    return weight + (codes * scale - weight).detach()


def fake_quantize_tokens(x: Tensor) -> Tensor:
    """int8 by the token's own maximum, straight-through."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return x + ((x / step).round() * step - x).detach()


class Linear(nn.Linear):
    """A linear layer, ternary if asked."""

    def __init__(self, inputs: int, outputs: int, *, ternary: bool, quantize_input: bool = True):
        super().__init__(inputs, outputs, bias=False)
        self.ternary = ternary
        self.quantize_input = quantize_input

    def forward(self, x: Tensor) -> Tensor:
        if not self.ternary:
            return F.linear(x, self.weight)
        if self.quantize_input:
            x = fake_quantize_tokens(x)
        return F.linear(x, fake_quantize_weight(self.weight))


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, config: SigmaModelConfig) -> Tensor:
    """x (N, D), gate_up (2h, D), down (D, h)."""
    ternary = config.quant_mode != "none"
    if ternary:
        x, gate_up, down = fake_quantize_tokens(x), *map(fake_quantize_weight, (gate_up, down))
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if config.sub_norm:
        hidden = F.rms_norm(hidden, (hidden.shape[-1],), eps=config.norm_eps)
    return F.linear(fake_quantize_tokens(hidden) if ternary else hidden, down)


class FeedForward(nn.Module):
    def __init__(self, config: SigmaModelConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.gate_up = nn.Linear(config.d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu(x, self.gate_up.weight, self.down.weight, self.config), x.new_zeros(())


class ExpertWeights(nn.Module):
    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        num, width = config.n_routed_experts, config.d_expert
        self.gate_up = nn.Parameter(torch.zeros(num, 2 * width, config.d_model))
        self.down = nn.Parameter(torch.zeros(num, config.d_model, width))


class MixtureOfExperts(nn.Module):
    """Sigmoid router balanced by a bias, one masked pass per expert; z-loss; no RIB term."""

    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        if config.rib_router_enabled or config.router_jitter_noise:
            raise ValueError("the plain twin has neither --rib-router-enabled nor router noise")
        self.config = config
        self.router = nn.Linear(config.d_model, config.n_routed_experts, bias=False)
        self.experts = ExpertWeights(config)
        self.shared = None
        if config.n_shared_experts:
            self.shared = FeedForward(config, config.n_shared_experts * config.d_expert)
        self.balance_bias: Tensor
        self.load: Tensor
        self.register_buffer("balance_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("router_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("load", torch.zeros(config.n_routed_experts), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.router.weight
        if self.config.moe_gate_precision == "bf16":
            weight = weight + (weight.bfloat16().float() - weight).detach()
        logits = F.linear(x, weight)  # (N, E)
        affinity = torch.sigmoid(logits)
        chosen = (affinity.detach() + self.balance_bias).topk(self.config.moe_top_k).indices
        gates = affinity.gather(1, chosen)
        if self.config.moe_top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(self.config.n_routed_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            out = swiglu(
                x[token], self.experts.gate_up[expert], self.experts.down[expert], self.config
            )
            y = y.index_add(0, token, gates[token, slot].unsqueeze(1) * out)
        if self.training:
            self.load += torch.bincount(chosen.flatten(), minlength=len(self.load))
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, self.config.moe_z_loss_weight * torch.logsumexp(logits, -1).square().mean()

    @torch.no_grad()
    def balance(self) -> None:
        """Move the bias (E,) by one fixed step against the loads since the last call, and forget
        those."""
        rate = self.config.router_balance_lr
        self.balance_bias += rate * torch.sign(self.load.mean() - self.load)
        self.balance_bias.clamp_(-2, 2)
        self.load.zero_()


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn pairs (i, i + J) of x (..., >= 2 J) by angle (..., J)."""
    size = angle.shape[-1]
    first, second, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class Attention(nn.Module):
    """Latent attention, plain or as the difference of two maps over the same keys and values."""

    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        self.config = config
        ternary = config.quant_mode != "none"
        width, heads = config.d_model, config.n_heads
        self.maps = 2 if config.diff_attention_enabled else 1
        queries, latent = heads * self.maps, config.kv_latent_dim
        self.q_content = Linear(width, queries * config.d_head, ternary=ternary)
        self.q_rope = Linear(width, queries * config.rope_dim, ternary=ternary)
        self.kv_down = Linear(width, latent, ternary=ternary)
        self.k_rope_up = Linear(width, config.rope_dim, ternary=ternary)
        self.latent_norm = nn.RMSNorm(latent, eps=config.norm_eps)
        inner = heads * config.d_head
        self.k_content_up = Linear(latent, inner, ternary=ternary, quantize_input=False)
        self.v_up = Linear(latent, inner, ternary=ternary, quantize_input=False)
        self.sub_norm = nn.RMSNorm(inner, eps=config.norm_eps) if config.sub_norm else None
        self.out_proj = Linear(inner, width, ternary=ternary)
        if config.diff_attention_enabled:
            self.gate_lambda = nn.Linear(width, heads)

    def forward(self, x: Tensor, documents: Tensor) -> Tensor:
        config, (batch, length, _) = self.config, x.shape
        position = torch.arange(length, device=x.device).unsqueeze(-1)
        index = torch.arange(0, config.rope_dim, 2, device=x.device)
        angle = (position * config.rope_theta ** (-index / config.rope_dim)).unsqueeze(1)
        shape = (batch, length, config.n_heads * self.maps, -1)
        content, turned = self.q_content(x).view(shape), rotate(self.q_rope(x).view(shape), angle)
        q = torch.cat([content, turned], dim=-1).unflatten(2, (config.n_heads, self.maps))
        latent = self.latent_norm(self.kv_down(x))
        shape = (batch, length, config.n_heads, -1)
        key_rope = rotate(self.k_rope_up(x).unsqueeze(2), angle).expand(shape)
        k = torch.cat([self.k_content_up(latent).view(shape), key_rope], dim=-1).transpose(1, 2)
        v = self.v_up(latent).view(shape).transpose(1, 2)
        allowed = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)
        scale = (config.d_head + config.rope_dim) ** -0.5
        outs = [
            F.scaled_dot_product_attention(
                q[:, :, :, m].transpose(1, 2), k, v, attn_mask=allowed, scale=scale
            )
            for m in range(self.maps)
        ]
        y = outs[0]
        if self.maps == 2:
            low, high = config.diff_attention_lambda_min, config.diff_attention_lambda_max
            lam = low + (high - low) * torch.sigmoid(self.gate_lambda(x))
            y = y - lam.transpose(1, 2).unsqueeze(-1) * outs[1]
        y = y.transpose(1, 2).flatten(2)
        return self.out_proj(y if self.sub_norm is None else self.sub_norm(y))


def segsum(x: Tensor) -> Tensor:
    """Sums of x (..., Q) over s+1..t, -inf where t < s: (..., Q, Q). Mamba-2's minimal form."""
    size = x.shape[-1]
    x = x.unsqueeze(-1).expand(*x.shape, size)  # (..., t, s) = x_t
    seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    summed = x.masked_fill(~seen.tril(-1), 0).cumsum(-2)
    return summed.masked_fill(~seen, -torch.inf)


def chunked_scan(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, size: int) -> Tensor:
    """y_t = sum over s <= t of exp(sum of log_decay over s+1..t) (c_t . b_s) x_s.

    x (B, T, H, P), log_decay (B, T, H), b and c (B, T, N), T a multiple of size. Mamba-2's
    published minimal form with one group.
    """
    x, log_decay, b, c = (v.unflatten(1, (-1, size)) for v in (x, log_decay, b, c))
    log_decay = log_decay.permute(0, 3, 1, 2)  # (B, H, K, Q)
    running = log_decay.cumsum(-1)
    inside = torch.exp(segsum(log_decay))
    y = torch.einsum("bkln,bksn,bhkls,bkshp->bklhp", c, b, inside, x)
    to_end = torch.exp(segsum(log_decay)[..., -1, :])
    states = torch.einsum("bksn,bhks,bkshp->bkhpn", b, to_end, x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(segsum(F.pad(running[..., -1], (1, 0))))  # (B, H, K + 1, K + 1)
    states = torch.einsum("bhzk,bkhpn->bzhpn", between, states)[:, :-1]
    y = y + torch.einsum("bkln,bkhpn,bhkl->bklhp", c, states, torch.exp(running))
    return y.flatten(1, 2)


class Mamba(nn.Module):
    """Mamba-3 of rank 1: trapezoid, rotation, gated norm."""

    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        if config.mimo_rank != 1:
            raise ValueError("the plain twin is written for --mimo-rank 1")
        self.config = config
        ternary = config.quant_mode != "none"
        heads, states = config.mamba_heads, config.mamba_d_state
        num_angles = int(states * config.mamba_rope_fraction) // 2
        self.sizes = [heads, heads, heads, num_angles]
        self.in_proj = Linear(config.d_model, 2 * config.d_inner + 2 * states, ternary=ternary)
        self.out_proj = Linear(config.d_inner, config.d_model, ternary=ternary)
        self.control_proj = nn.Linear(config.d_model, sum(self.sizes))
        self.bc_gain = nn.Parameter(torch.ones(2, 1, states))
        self.bc_bias = nn.Parameter(torch.ones(2, 1, states))
        self.skip = nn.Parameter(torch.ones(heads))
        self.rank_out = nn.Parameter(torch.ones(heads, 1, config.mamba_head_dim))
        self.step_scale = nn.Parameter(torch.ones(()))

    def forward(self, u: Tensor, starts: Tensor) -> Tensor:
        config, (batch, length, _) = self.config, u.shape
        dt, rate, trap, angle = self.control_proj(u).split(self.sizes, dim=-1)
        dt, trap = F.softplus(dt), torch.sigmoid(trap)
        decay = -torch.where(rate > 0, 1 + rate, 1 / (1 - rate.clamp_max(0))).clamp(1e-4, 1e4)
        log_decay = (dt * decay).masked_fill(starts.unsqueeze(-1), -1e4)
        inner, states = config.d_inner, config.mamba_d_state
        z, x, bc = self.in_proj(u).split([inner, inner, 2 * states], dim=-1)
        bc = F.rms_norm(bc.unflatten(-1, (2, 1, states)), (states,), eps=config.norm_eps)
        b, c = (bc * self.bc_gain + self.bc_bias).squeeze(3).unbind(2)  # (B, T, N)
        total = (math.pi * torch.tanh(angle)).cumsum(1)
        b, c = rotate(b, total), rotate(c, total)
        heads = (batch, length, config.mamba_heads, config.mamba_head_dim)
        x, z = x.reshape(heads), z.reshape(heads)
        # h_t = a_t h_{t-1} + (1 - trap_t) dt_t a_t b_{t-1} x_{t-1} + trap_t dt_t b_t x_t: the
        # second term belongs to source t - 1 for every later target.
        carried = F.pad(((1 - trap) * dt)[:, 1:], (0, 0, 0, 1))
        weighted = (trap * dt + carried).unsqueeze(-1) * x
        y = chunked_scan(weighted, log_decay, b, c, min(config.mamba_chunk_len, length))
        own = (b * c).sum(-1, keepdim=True)  # (B, T, 1)
        y = y + ((self.skip - carried * own).unsqueeze(-1)) * x
        y = F.rms_norm(y, (y.shape[-1],), eps=config.norm_eps) * self.rank_out.squeeze(1)
        return self.out_proj((y * F.silu(z)).flatten(2)) * self.step_scale


class Engram(nn.Module):
    """Hashed n-gram memory; hash constants and table layout come with the loaded state."""

    def __init__(self, config: SigmaModelConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.canonical_ids: Tensor
        self.multipliers: Tensor
        self.table_sizes: Tensor
        self.table_starts: Tensor
        for name in ("canonical_ids", "multipliers", "table_sizes", "table_starts"):
            self.register_buffer(name, state[name].clone())
        self.table = nn.Parameter(torch.zeros_like(state["table"]))
        ternary = config.quant_mode != "none"
        width = config.d_model
        self.key_value = Linear(
            len(config.engram_orders) * config.engram_heads * config.engram_dim,
            2 * width,
            ternary=ternary,
        )
        norms = (nn.RMSNorm(width, eps=config.norm_eps) for _ in range(3))
        self.query_norm, self.key_norm, self.conv_norm = norms
        self.conv_weight = nn.Parameter(torch.zeros_like(state["conv_weight"]))
        self.gate_scale = nn.Parameter(torch.ones(()))

    def shifted(self, values: Tensor, lag: int, documents: Tensor, missing: int) -> Tensor:
        """values (B, T, ...) of `lag` tokens ago, `missing` where that is another document."""
        if lag == 0:
            return values
        pad = (0, 0) * (values.dim() - 2) + (lag, 0)
        moved = F.pad(values, pad, value=missing)[:, : values.shape[1]]
        same = F.pad(documents, (lag, 0), value=0)[:, : values.shape[1]] == documents
        return torch.where(same.view(*same.shape, *[1] * (values.dim() - 2)), moved, missing)

    def forward(self, hidden: Tensor, ids: Tensor, documents: Tensor) -> Tensor:
        ids = self.canonical_ids[ids]
        keys = []
        for index, order in enumerate(self.config.engram_orders):
            key = ids * self.multipliers[index, 0]
            for lag in range(1, order):
                seen = self.shifted(ids, lag, documents, self.config.vocab_size)
                key = key ^ (seen * self.multipliers[index, lag])
            keys.append(key)
        rows = torch.stack(keys, dim=-1).unsqueeze(-1) % self.table_sizes + self.table_starts
        key, value = self.key_value(F.embedding(rows, self.table).flatten(2)).chunk(2, dim=-1)
        agreement = (self.query_norm(hidden) * self.key_norm(key)).sum(-1, keepdim=True)
        agreement = agreement / math.sqrt(hidden.shape[-1])
        root = agreement.abs().clamp_min(1e-6).sqrt() * agreement.sign()
        scale = (F.softplus(self.gate_scale) + 0.1).clamp(0.1, 4.0)
        value = torch.sigmoid(scale * root) * value
        normed, dilation = self.conv_norm(value), max(self.config.engram_orders)
        smoothed = torch.zeros_like(normed)
        for tap, weight in enumerate(self.conv_weight):
            smoothed = smoothed + self.shifted(normed, tap * dilation, documents, 0) * weight
        return value + F.silu(smoothed)


class Block(nn.Module):
    def __init__(self, config: SigmaModelConfig, layer: int, state: dict[str, Tensor]) -> None:
        super().__init__()
        prefix = f"blocks.{layer}.engram."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.engram = Engram(config, own) if own else None
        self.kind = config.layer_kinds()[layer]
        self.two_stream = config.residual_layout == "two-stream"
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mamba(config) if self.kind == "mamba" else Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        moe = config.n_routed_experts > 0
        self.ffn = MixtureOfExperts(config) if moe else FeedForward(config, config.d_ff)

    def forward(
        self, read: Tensor, write: Tensor, ids: Tensor, starts: Tensor, documents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The streams (read, write) after this block and its auxiliary loss."""
        if self.engram is not None:
            read = read + self.engram(write, ids, documents)
            write = write if self.two_stream else read
        normed = self.mixer_norm(read)
        write = write + self.mixer(normed, starts if self.kind == "mamba" else documents)
        fed, aux = self.ffn(self.ffn_norm(write).flatten(0, 1))
        fed = fed.view_as(write)
        if self.two_stream:
            return read + fed, write, aux
        return write + fed, write + fed, aux


@dataclass(slots=True)
class PlainOutput:
    """Mean nats and weighted auxiliary loss."""

    loss: Tensor
    aux: Tensor


class PlainSigma(nn.Module):
    """The network of a SigmaLLM with these settings; `state` is that model's state_dict."""

    def __init__(self, config: SigmaModelConfig, state: dict[str, Tensor]) -> None:
        super().__init__()
        if config.bitlinear_group_size or config.dropout or not config.tie_embeddings:
            raise ValueError("the plain twin has row scales, tied embeddings and no dropout")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i, state) for i in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.load_state_dict(state)

    def forward(self, ids: Tensor, *, reset_mask: Tensor, labels: Tensor) -> PlainOutput:
        """ids, labels (B, T) int64, reset_mask (B, T) bool: where a document starts."""
        documents = reset_mask.long().cumsum(1)
        write = read = self.embed(ids)
        aux = read.new_zeros(())
        for block in self.blocks:
            read, write, term = block(read, write, ids, reset_mask, documents)
            aux = aux + term
        hidden = self.final_norm((read + write) / 2 if self._two_stream else read)
        logits = F.linear(hidden, self.embed.weight).flatten(0, 1)
        return PlainOutput(F.cross_entropy(logits, labels.flatten(), ignore_index=-100), aux)

    @property
    def _two_stream(self) -> bool:
        return self.config.residual_layout == "two-stream"

    def balance(self) -> None:
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.balance()
