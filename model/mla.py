"""Multi-head latent attention, plain or differential.

Keys and values of all heads are linear in one normalised latent of width d_c; position enters by
one rotary key of width d_R that all heads share. A row's cache is therefore d_c + d_R numbers per
token. Training and prefill expand the latent to keys and values; short continuations instead carry
the queries into the latent space (absorption) and never expand the cache. The two are the same
function because the up-projections act on unrounded latents.

The differential variant doubles the queries only: heads 2i and 2i+1 attend the same keys and
values, and out_i = A1 v - lambda A2 v with lambda per token and head.

Decisions: all four projections of the input run as one product (their ternary scales are per row,
so concatenation changes nothing; one rounding of the input and one input gradient instead of four:
9 % less time on CPU at d_model 256; the two up-projections gain nothing and stay apart);
sub_norm is a learnable RMSNorm over the concatenated heads, as in BitNet b1.58 2B4T, not one per
head; attention probabilities are not dropped out.

Sources: DeepSeek-V2 2405.04434; DIFF V2; BitNet b1.58 2402.17764.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import (
    SAMPLED_QUERIES,
    attend,
    blocked_pairs,
    context_blocked_pairs,
    context_documents,
    subtracted_share,
)
from model.bitlinear import BitLinear, compute_dtype, fused_linear
from model.config import SigmaModelConfig
from model.latent_cache import LatentCache
from model.norm_rope import RMSNorm, apply_rope, context_rope_table
from model.sequence import SequenceContext


class MLA(nn.Module):
    """Latent attention mixer of a block; input is already normalised.

    Shapes: H heads of width d_h = d_model / H, P = 2 maps if differential, else 1. Query rows are
    ordered head by head, map by map, so that head 2i of the doubled queries is the kept map.
    """

    def __init__(self, config: SigmaModelConfig) -> None:
        super().__init__()
        self.heads, self.d_head = config.n_heads, config.d_head
        self.d_latent, self.d_rope = config.kv_latent_dim, config.rope_dim
        self.rope_theta = config.rope_theta
        self.scale = (self.d_head + self.d_rope) ** -0.5
        self.differential = config.diff_attention_enabled
        self.maps = 2 if self.differential else 1
        width, queries = config.d_model, self.heads * self.maps

        def linear(inputs: int, outputs: int, *, quantize_activations: bool = True) -> BitLinear:
            return BitLinear(
                inputs,
                outputs,
                group_size=config.bitlinear_group_size,
                quant_mode=config.quant_mode,
                quantize_activations=quantize_activations,
            )

        self.q_content = linear(width, queries * self.d_head)
        self.q_rope = linear(width, queries * self.d_rope)
        self.kv_down = linear(width, self.d_latent)
        self.k_rope_up = linear(width, self.d_rope)
        self.latent_norm = RMSNorm(self.d_latent, eps=config.norm_eps)
        # Unrounded inputs: absorption exchanges these products with the attention sums.
        outputs = self.heads * self.d_head
        self.k_content_up = linear(self.d_latent, outputs, quantize_activations=False)
        self.v_up = linear(self.d_latent, outputs, quantize_activations=False)
        self.sub_norm = RMSNorm(outputs, eps=config.norm_eps) if config.sub_norm else None
        self.out_proj = linear(outputs, width)
        self._statistics: Tensor | None = None
        self.backend = "torch"
        if self.differential:
            self._add_gate(config)

    def _add_gate(self, config: SigmaModelConfig) -> None:
        """lambda = low + (high - low) sigmoid(w h + b), w = 0 and b such that it starts at init."""
        self.lambda_min = config.diff_attention_lambda_min
        self.lambda_max = config.diff_attention_lambda_max
        start = config.diff_attention_lambda_init - self.lambda_min
        share = start / (self.lambda_max - self.lambda_min)
        self.gate_lambda = nn.Linear(config.d_model, self.heads)
        nn.init.zeros_(self.gate_lambda.weight)
        nn.init.constant_(self.gate_lambda.bias, math.log(share / (1.0 - share)))

    def initial_state(
        self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> LatentCache:
        """Empty state of `batch_size` rows."""
        return LatentCache(
            latent=torch.empty(batch_size, 0, self.d_latent, device=device, dtype=dtype),
            rotary_key=torch.empty(batch_size, 0, self.d_rope, device=device, dtype=dtype),
        )

    def forward(
        self,
        x: Tensor,
        context: SequenceContext,
        *,
        state: LatentCache | None = None,
        absorb: bool | None = None,
    ) -> tuple[Tensor, LatentCache | None]:
        """x (B, T, D) -> y (B, T, D) and the state after these tokens.

        A state is returned when one was given or `context.use_cache` is set. absorb: force the
        absorbed (True) or expanded (False) form of a continuation; None picks the cheaper one.
        """
        q_content, q_rope, latent, rotary_key = self._project(x, context)
        lam = self.gate(x) if self.differential else None
        keep = context.use_cache or state is not None
        continued = state is not None and state.length > 0
        if state is None and keep:
            state = self.initial_state(x.shape[0], device=x.device, dtype=latent.dtype)
        if state is not None:
            documents = context_documents(context, continued=continued)
            state = state.append(latent, rotary_key, documents)
        if continued and state is not None:
            held = slice(0, state.length)
            latent, rotary_key = state.latent[:, held], state.rotary_key[:, held]
            documents = None if state.documents is None else state.documents[:, held]
        else:
            documents = context_documents(context)
        if absorb is None:
            absorb = continued and self.absorption_pays(x.shape[1])
        if self.backend == "triton" and not absorb:
            in_bf16 = compute_dtype(x) is torch.bfloat16
            y = self._attend_fused(
                q_content, q_rope, latent, rotary_key, lam, documents, in_bf16=in_bf16
            )
        else:
            blocked = context_blocked_pairs(context)
            if continued:
                blocked = None if documents is None else blocked_pairs(documents, x.shape[1])
            parts = (q_content, q_rope, latent, rotary_key, lam, blocked)
            if absorb:
                y = self.attend_absorbed(*parts, self.absorbed_weights(latent.dtype))
            else:
                y = self._attend_expanded(*parts)  # (B, T, H d_h)
        out, norm = self.out_proj, self.sub_norm
        y = out(y) if norm is None else out.after_norm(y, norm)
        return y, state if keep else None

    def _project(
        self, x: Tensor, context: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (B, P, H, T, d_h) and (B, P, H, T, d_R), latent and rotary key of x."""
        batch, length = x.shape[:2]
        layers = (self.q_content, self.q_rope, self.kv_down, self.k_rope_up)
        content, rotary, latent, rotary_key = fused_linear(x, layers)
        cos, sin = context_rope_table(context, self.d_rope, theta=self.rope_theta)
        rotary = apply_rope(rotary.view(batch, length, -1, self.d_rope), cos, sin)
        rotary_key = apply_rope(rotary_key, cos, sin)
        order = (0, 3, 2, 1, 4)
        shape = (batch, length, self.heads, self.maps)
        q_content = content.view(*shape, self.d_head).permute(order)
        q_rope = rotary.view(*shape, self.d_rope).permute(order)
        return q_content, q_rope, self.latent_norm(latent), rotary_key

    def gate(self, x: Tensor) -> Tensor:
        """(B, H, T, 1) in fp32 at least: the gate is exempt from rounding and from autocast."""
        with torch.autocast(x.device.type, enabled=False):
            gate = self.gate_lambda
            logits = F.linear(x.to(gate.weight.dtype), gate.weight, gate.bias)
            share = torch.sigmoid(logits.float() if logits.dtype.itemsize < 4 else logits)
        lam = self.lambda_min + (self.lambda_max - self.lambda_min) * share  # (B, T, H)
        return lam.transpose(1, 2).unsqueeze(-1)

    def _attend_expanded(
        self,
        q_content: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        lam: Tensor | None,
        blocked: Tensor | None,
    ) -> Tensor:
        batch, num_keys = latent.shape[:2]
        k, v = self.k_content_up(latent), self.v_up(latent)
        k = k.view(batch, num_keys, self.heads, self.d_head).transpose(1, 2)
        v = v.view(batch, num_keys, self.heads, self.d_head).transpose(1, 2)
        shared = rotary_key.unsqueeze(1).expand(-1, self.heads, -1, -1)
        k = torch.cat((k, shared.to(k.dtype)), dim=-1)  # (B, H, S, d_h + d_R)
        q = torch.cat((q_content, q_rope), dim=-1)  # (B, P, H, T, d_h + d_R)
        if lam is not None and self.training and torch.is_grad_enabled():
            self._record(q, k, v, lam, blocked)
        out = attend(q, k, v, scale=self.scale, lam=lam, blocked=blocked)
        return out.flatten(2)

    def _attend_fused(
        self,
        q_content: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        lam: Tensor | None,
        documents: Tensor | None,
        *,
        in_bf16: bool,
    ) -> Tensor:
        """The expanded form by kernels that take its parts as they are, without a mask."""
        from model.attention_kernels import attend_parts

        shape = (*latent.shape[:2], self.heads, self.d_head)
        k, v = self.k_content_up(latent).view(shape), self.v_up(latent).view(shape)
        if lam is not None and self.training and torch.is_grad_enabled():
            rows = slice(-SAMPLED_QUERIES, None)
            q = torch.cat((q_content[:1, :, :, rows], q_rope[:1, :, :, rows]), dim=-1)
            shared = rotary_key[:1].unsqueeze(2).expand(-1, -1, self.heads, -1)
            keys = torch.cat((k[:1], shared.to(k.dtype)), dim=-1).transpose(1, 2)
            blocked = None if documents is None else blocked_pairs(documents[:1], q.shape[3])
            self._record(q, keys, v[:1].transpose(1, 2), lam, blocked)
        out = attend_parts(
            q_content.permute(0, 3, 2, 1, 4),
            q_rope.permute(0, 3, 2, 1, 4),
            k,
            rotary_key,
            v,
            scale=self.scale,
            lam=None if lam is None else lam.squeeze(-1),
            documents=documents,
            in_bf16=in_bf16,
        )
        return out.to(q_content.dtype).flatten(2)

    def absorbed_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The up-projections of keys and values as (H, d_h, d_c) each."""
        shape = (self.heads, self.d_head, self.d_latent)
        key_up = self.k_content_up.effective_weight().view(shape).to(dtype)
        return key_up, self.v_up.effective_weight().view(shape).to(dtype)

    def attend_absorbed(
        self,
        q_content: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        lam: Tensor | None,
        blocked: Tensor | None,
        weights: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The same sums in the latent space: scores (q W_UK) c + q_R k_R, values W_UV (A c).

        weights as from `absorbed_weights`.
        """
        batch, maps, heads, num_queries, _ = q_content.shape
        key_up, value_up = weights
        q = torch.matmul(q_content.to(latent.dtype), key_up)  # (B, P, H, T, d_c)
        q = torch.cat((q, q_rope.to(latent.dtype)), dim=-1).flatten(1, 3)
        keys = torch.cat((latent, rotary_key.to(latent.dtype)), dim=-1)  # (B, S, d_c + d_R)
        scores = torch.matmul(q, keys.mT).view(batch, maps * heads, num_queries, -1) * self.scale
        if blocked is None and num_queries > 1:
            ones = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            blocked = ones.triu_(scores.shape[3] - num_queries + 1)
        if blocked is not None:
            scores = scores.masked_fill(blocked, float("-inf"))
        probs = torch.softmax(scores.float() if scores.dtype.itemsize < 4 else scores, dim=-1)
        probs = probs.view(batch, maps, heads, num_queries, -1)
        total = probs[:, 0] if lam is None else probs[:, 0] - lam * probs[:, 1]
        mixed = torch.matmul(total.to(latent.dtype).flatten(1, 2), latent)
        mixed = mixed.view(batch, heads, num_queries, self.d_latent)
        return torch.matmul(mixed, value_up.mT).transpose(1, 2).flatten(2)

    def absorption_pays(self, num_queries: int) -> bool:
        """Per cached token and head: 2 d_c d_h to expand it, or products d_c wide, not d_h."""
        wider = (self.maps + 1) * (self.d_latent - self.d_head)
        return num_queries * wider < 2 * self.d_latent * self.d_head

    @torch.no_grad()
    def _record(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, blocked: Tensor | None) -> None:
        share = subtracted_share(q, k, v, scale=self.scale, lam=lam, blocked=blocked)
        values = (lam.mean(), *torch.aminmax(lam), share)
        self._statistics = torch.stack([value.float() for value in values])

    def differential_active(self) -> Tensor:
        """0-d bool, unread: whether the last training forward subtracted and lambda has gradient.

        For use between backward and the optimizer's zero_grad; it does not wait for the device.
        """
        device = self.out_proj.weight.device
        if not self.differential or self._statistics is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        active = self._statistics[3] > 1e-6
        for parameter in self.gate_lambda.parameters():
            if parameter.grad is None:
                return torch.zeros((), dtype=torch.bool, device=device)
            active = active & parameter.grad.any()
        return active

    def metrics(self) -> dict[str, float]:
        """Cache bytes per token and, if differential, figures of the last training forward."""
        numbers = self.d_latent + self.d_rope
        result = {"mla_cache_bytes_per_token": float(numbers * self.out_proj.weight.element_size())}
        if self._statistics is not None:
            mean, low, high, share = self._statistics.tolist()
            result["diff_attn_lambda_mean"] = mean
            result["diff_attn_lambda_min"] = low
            result["diff_attn_lambda_max"] = high
            result["diff_attn_output_delta"] = share
        return result
