"""Feed-forward networks: dense SwiGLU, and a mixture of fine-grained experts with shared experts.

Routing takes sigmoid affinities s = sigma(u . e_i / tau). Experts are selected by s + b, where b is
a bias that only balances: after each optimizer step it moves by a fixed amount against the sign of
the expert's surplus load. Gates are the bias-free s, normalised over the selected experts (top-1
keeps s itself, or the router would get no gradient). No token is dropped.

State that outlives a step (the bias, the temperature tau of the RIB regulariser, the noise counter)
lives in persistent buffers, so a resumed run routes as the uninterrupted one. tau is set between
steps from the last step's statistics: a temperature taken from the current batch would let a
token see later ones.

Sources: DeepSeekMoE 2401.06066; loss-free balancing 2408.15664; z-loss: ST-MoE 2202.08906. The RIB
("reciprocal information bottleneck") regulariser has no literature and can be switched off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bitlinear import BitLinear
from model.config import SigmaModelConfig
from model.dispatch import DispatchPlan, count_experts
from model.sequence import SequenceContext
from model.swiglu import SwigluSettings, swiglu, swiglu_definition

BIAS_LIMIT = 2.0
TEMPERATURE_RANGE = (0.8, 1.35)
_ENTROPY_LIMIT = 0.99
_EPS = 1e-6
_TINY = 1e-20
_MASK = 2**32 - 1
# Batch means kept for the metrics and the temperature.
_TERMS = ("entropy", "z_loss", "rib_info", "rib_collapse", "rib_confidence")


def swiglu_settings(config: SigmaModelConfig) -> SwigluSettings:
    """What of the network's settings a feed-forward, dense or expert, computes by."""
    return SwigluSettings(
        ternary=config.quant_mode != "none",
        group_size=config.bitlinear_group_size,
        sub_norm=config.sub_norm,
        eps=config.norm_eps,
    )


class DenseFeedForward(nn.Module):
    """SwiGLU of the given hidden width; weights are held by BitLinear layers, gate above up."""

    def __init__(self, config: SigmaModelConfig, *, width: int) -> None:
        super().__init__()
        self.settings = swiglu_settings(config)
        shape = {"group_size": config.bitlinear_group_size, "quant_mode": config.quant_mode}
        self.gate_up = BitLinear(config.d_model, 2 * width, **shape)
        self.down = BitLinear(width, config.d_model, **shape)

    def forward(self, u: Tensor, context: SequenceContext) -> tuple[Tensor, dict[str, Tensor]]:
        """u (B, T, D) -> y (B, T, D) and no auxiliary losses."""
        return self.transform(u.flatten(0, 1)).view_as(u), {}

    def transform(self, tokens: Tensor) -> Tensor:
        """tokens (N, D) -> (N, D)."""
        return swiglu(
            tokens,
            self.gate_up.weight,
            self.down.weight,
            settings=self.settings,
        )


class Experts(nn.Module):
    """Routed experts: gate_up (E, 2h, D), gate rows above up rows, and down (E, D, h)."""

    def __init__(self, num_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, width))
        nn.init.normal_(self.gate_up, std=d_model**-0.5)
        nn.init.normal_(self.down, std=width**-0.5)


class MoE(nn.Module):
    """Shared experts, applied to every token, plus top-k of the routed experts.

    `--moe-dispatch-mode`: legacy loops over experts with masks and is the definition; packed sorts
    token copies by expert and multiplies slices; grouped does the sorted product of all experts in
    one grouped matrix product without host synchronisation where there is one: a Triton kernel
    with `--kernel-backend triton`, else torch's (CUDA, bf16, widths that are multiples of 8).
    Elsewhere, and on CPU always, grouped runs the packed product, which is the faster one there.
    `product_kind` tells which one a forward will use.
    """

    def __init__(self, config: SigmaModelConfig, *, layer: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.settings = swiglu_settings(config)
        self.noise_key = (seed * 2_654_435_761 + layer * 40_503 + 1) % 2**31
        num_experts = config.n_routed_experts
        self.router = nn.Linear(config.d_model, num_experts, bias=False)
        self.experts = Experts(num_experts, config.d_model, config.d_expert)
        self.shared: DenseFeedForward | None = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.d_expert
            self.shared = DenseFeedForward(config, width=width)
        self.balance_bias: Tensor
        self.temperature: Tensor
        self.router_step: Tensor
        self.load_counts: Tensor
        self.term_sums: Tensor
        self.last_usage: Tensor
        self.last_means: Tensor
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("router_step", torch.zeros((), dtype=torch.int64))
        for name, size in (
            ("load_counts", num_experts),
            ("last_usage", num_experts),
            ("term_sums", len(_TERMS) + 1),  # the last one counts micro-batches
            ("last_means", len(_TERMS)),
        ):
            self.register_buffer(name, torch.zeros(size), persistent=False)

    def forward(self, u: Tensor, context: SequenceContext) -> tuple[Tensor, dict[str, Tensor]]:
        """u (B, T, D) -> y (B, T, D) without the residual, and the weighted auxiliary losses."""
        tokens = u.flatten(0, 1)  # (N, D)
        valid = None if context.valid_mask is None else context.valid_mask.flatten().float()
        with torch.autocast(u.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.router_weight())  # (N, E)
            affinity = self.affinity(logits)
            selected, gates = self.select(affinity)
            aux: dict[str, Tensor] = {}
            if self.training:
                aux, means = self._auxiliary(logits, affinity, valid)
                if torch.is_grad_enabled():
                    self._record(selected, valid, means)
        y = self._dispatch(tokens, selected, gates)
        if self.shared is not None:
            y = y + self.shared.transform(tokens)
        return y.view_as(u), aux

    def router_weight(self) -> Tensor:
        """The router's fp32 weight (E, D) as `--moe-gate-precision` stores it, straight-through."""
        weight = self.router.weight.float()
        with torch.no_grad():
            if self.config.moe_gate_precision == "bf16":
                stored = weight.bfloat16().float()
            else:
                step = weight.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127.0
                stored = (weight / step).round() * step
            error = stored - weight
        return weight + error

    def select(self, affinity: Tensor) -> tuple[Tensor, Tensor]:
        """Experts (N, k) chosen by affinity + bias, and their bias-free gates (N, k)."""
        k = self.config.moe_top_k
        selected = (affinity.detach() + self.balance_bias).topk(k, dim=-1).indices
        gates = affinity.gather(1, selected)
        if k > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(_TINY)
        return selected, gates

    def product_kind(self, tokens: Tensor) -> str:
        """ "legacy", "packed" or "grouped": how the experts' products are computed for tokens."""
        mode = self.config.moe_dispatch_mode
        if mode != "grouped":
            return mode
        if self.settings.has_kernels(self.config.d_model, self.config.d_expert):
            return "grouped"
        device_type = tokens.device.type
        dtype = tokens.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        widths = (self.config.d_model, self.config.d_expert)
        fits = dtype == torch.bfloat16 and all(width % 8 == 0 for width in widths)
        return "grouped" if device_type == "cuda" and fits else "packed"

    def affinity(self, logits: Tensor) -> Tensor:
        """Sigmoid affinities of logits (N, E); jittered while training."""
        noise = self.config.router_jitter_noise
        if self.training and noise > 0.0:
            uniform = counter_uniform(logits.shape, self.router_step, key=self.noise_key)
            logits = logits * (1.0 + noise * (2.0 * uniform - 1.0))
        if self.config.rib_router_enabled:
            logits = logits / self.temperature
        return torch.sigmoid(logits)

    def _dispatch(self, tokens: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
        kind = self.product_kind(tokens)
        weights = (self.experts.gate_up, self.experts.down)
        if kind == "legacy":
            return self._dispatch_by_mask(tokens, selected, gates)
        plan = DispatchPlan.create(
            selected, self.config.n_routed_experts, grouped=kind == "grouped"
        )
        return swiglu(tokens, *weights, settings=self.settings, plan=plan, gates=gates)

    def _dispatch_by_mask(self, tokens: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
        y = torch.zeros_like(tokens)
        for expert in range(self.config.n_routed_experts):
            token, slot = (selected == expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            out = swiglu_definition(
                tokens[token],
                self.experts.gate_up[expert],
                self.experts.down[expert],
                settings=self.settings,
            )
            y = y.index_add(0, token, (gates[token, slot].unsqueeze(1) * out).to(y.dtype))
        return y

    def _auxiliary(
        self, logits: Tensor, affinity: Tensor, valid: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted z-loss and RIB terms, and the unweighted means of _TERMS for the metrics."""
        config = self.config
        count = logits.shape[0] if valid is None else valid.sum().clamp_min(1.0)

        def mean(values: Tensor) -> Tensor:  # over tokens, padding left out
            if valid is not None:
                values = values * (valid if values.dim() == 1 else valid.unsqueeze(1))
            return values.sum(0) / count

        z_loss = mean(torch.logsumexp(logits, dim=-1).square())
        probs = affinity / affinity.sum(-1, keepdim=True).clamp_min(_TINY)
        entropy = -(probs * probs.clamp_min(_TINY).log()).sum(-1)
        entropy = entropy / math.log(max(config.n_routed_experts, 2))
        bounded = entropy.clamp(max=_ENTROPY_LIMIT)
        info = mean(bounded / (1.0 - bounded + _EPS))
        usage = mean(probs)
        collapse = usage.amax() - usage.amin()
        confidence = mean(probs.amax(-1) * (1.0 - entropy))
        aux = {"moe_z": config.moe_z_loss_weight * z_loss}
        if config.rib_router_enabled:
            aux["rib"] = (
                config.rib_info_weight * info
                + config.rib_collapse_penalty * collapse
                - config.rib_confidence_weight * confidence
            )
        with torch.no_grad():
            means = torch.stack((mean(entropy), z_loss, info, collapse, confidence))
        return aux, means

    @torch.no_grad()
    def _record(self, selected: Tensor, valid: Tensor | None, means: Tensor) -> None:
        """Add this micro-batch to the step's statistics, without reading anything back."""
        if valid is not None:
            # Padding counts for an expert that does not exist and is cut off again.
            padded = selected.masked_fill(valid.unsqueeze(1) == 0, self.config.n_routed_experts)
            selected = padded
        self.load_counts += count_experts(selected, self.config.n_routed_experts)
        self.term_sums[:-1] += means
        self.term_sums[-1] += 1.0

    def reset_statistics(self) -> None:
        """Forget what the running step has counted, for a step that is not applied."""
        self.load_counts.zero_()
        self.term_sums.zero_()

    @torch.no_grad()
    def apply_balance_update(self) -> None:
        """Move the selection bias and the temperature by the finished step's load, and zero it.

        b_i <- clip(b_i + rate * sign(mean load - load_i)); without any load nothing moves.
        """
        config = self.config
        load, batches = self.load_counts, self.term_sums[-1]
        self.balance_bias += config.router_balance_lr * torch.sign(load.mean() - load)
        self.balance_bias.clamp_(-BIAS_LIMIT, BIAS_LIMIT)
        usage = load / load.sum().clamp_min(1.0)
        means = self.term_sums[:-1] / batches.clamp_min(1.0)
        if config.rib_router_enabled:
            spread = usage.amax() - usage.amin()
            wanted = 1.0 + config.rib_temp_gain * (spread - 0.5 * (1.0 - means[0]))
            moved = wanted.clamp(*TEMPERATURE_RANGE)
            self.temperature.copy_(torch.where(batches > 0, moved, self.temperature))
        self.last_usage.copy_(usage)
        self.last_means.copy_(means)
        self.router_step += 1
        self.reset_statistics()

    def metrics(self) -> dict[str, float]:
        """Router figures of the last finished step. Synchronises the device."""
        config = self.config
        entropy, z_loss, info, collapse, confidence = self.last_means.tolist()
        usage = self.last_usage.tolist()
        total = (
            config.rib_info_weight * info
            + config.rib_collapse_penalty * collapse
            - config.rib_confidence_weight * confidence
        )
        return {
            "moe_entropy": entropy,
            "moe_z_loss": z_loss,
            "moe_usage_max": max(usage),
            "moe_usage_min": min(usage),
            "moe_usage_imbalance": max(usage) - min(usage),
            "moe_routed_fraction": sum(share > 0.0 for share in usage) / len(usage),
            "moe_router_bias_std": float(self.balance_bias.std(correction=0)),
            "moe_router_temp": float(self.temperature),
            "moe_max_vio": max(usage) * len(usage) - 1.0,
            "last_rib_info": info,
            "last_rib_collapse": collapse,
            "last_rib_confidence": confidence,
            "last_rib_total": total if config.rib_router_enabled else 0.0,
        }


def counter_uniform(shape: torch.Size, counter: Tensor, *, key: int) -> Tensor:
    """fp32 numbers in [0, 1) of the given shape: a pure function of (counter, key, position).

    Router noise comes from here and not from a generator, so that recomputing a block and resuming
    a run repeat it without any saved generator, on every device, and other random streams are not
    disturbed. Mixing: the 32-bit "lowbias32" finaliser, in int64 so that nothing overflows.
    counter: 0-d int64 tensor, read on its device.
    """
    size = math.prod(shape)
    stream = _mix((counter & _MASK) ^ key)
    value = torch.arange(size, device=counter.device)
    value = _mix(_mix(value ^ stream) + stream & _MASK)
    return (value >> 8).float().mul_(2.0**-24).view(shape)


def _mix(value: Tensor) -> Tensor:
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _MASK
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _MASK
    return value ^ (value >> 15)
