"""Engram: a trained memory of hashed n-grams, read at a few layers and gated by the hidden state.

Each n-gram of token ids that ends at the current token (which may be part of the key: it is known
when the next one is predicted; with --engram-canonical tokens that differ in case, accents or
spacing alone are one) is hashed into one row of several tables. Every head of
every order and layer has its own prime number of rows: with one shared modulus, two n-grams that
collide in one head would collide in all. The rows become a key, which decides with the hidden
state how far the gate opens, and a value, which is smoothed by a short causal convolution and
added to the residual stream. This is the cheapest way for a small network to hold n-gram counts:
a lookup costs no matrix product however many rows there are.

n-grams and the convolution never reach over a document start or into padding; a missing
predecessor has an id of its own.

Source: Engram 2601.07372.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.bitlinear import BitLinear
from model.config import SigmaModelConfig
from model.norm_rope import RMSNorm
from model.sequence import SequenceContext

CONV_KERNEL = 4
GATE_SCALE_RANGE = (0.1, 4.0)
_MULTIPLIER_BITS = 40  # times an id below 2^22 stays below 2^62
_MIN_AGREEMENT = 1e-6  # keeps the slope of sqrt|d| finite


@dataclass(slots=True)
class EngramState:
    """What the next tokens of a row need of the previous ones.

    ids: (B, max_order - 1) int64 canonical ids; the reserved id where there is no predecessor.
    tail: (B, (CONV_KERNEL - 1) * dilation, D) latest inputs of the convolution, 0 where none.
    """

    ids: Tensor
    tail: Tensor

    def reorder(self, index: Tensor) -> EngramState:
        """Rows picked by index (B',) int64."""
        return EngramState(self.ids.index_select(0, index), self.tail.index_select(0, index))


class Engram(nn.Module):
    """n-gram memory of one layer. `table` (rows of all heads, engram_dim) is the memory itself."""

    def __init__(self, config: SigmaModelConfig, *, layer: int) -> None:
        super().__init__()
        self.orders = tuple(config.engram_orders)
        self.heads = config.engram_heads
        self.missing_id = config.vocab_size
        self.dilation = max(self.orders)
        layer_rank = sorted(config.engram_layers).index(layer)
        num_tables = len(self.orders) * self.heads
        primes = nearest_primes(config.engram_buckets, num_tables * len(config.engram_layers))
        primes = primes[layer_rank * num_tables : (layer_rank + 1) * num_tables]
        width = config.d_model
        self.table = nn.Parameter(torch.empty(sum(primes), config.engram_dim))
        nn.init.normal_(self.table, std=config.init_std)
        self.key_value = BitLinear(
            num_tables * config.engram_dim,
            2 * width,
            group_size=config.bitlinear_group_size,
            quant_mode=config.quant_mode,
        )
        self.query_norm = RMSNorm(width, eps=config.norm_eps)
        self.key_norm = RMSNorm(width, eps=config.norm_eps)
        self.conv_norm = RMSNorm(width, eps=config.norm_eps)
        # Zero taps: the convolution starts as the identity of the sum and learns its way in.
        self.conv_weight = nn.Parameter(torch.zeros(CONV_KERNEL, width))
        self.gate_scale = nn.Parameter(torch.tensor(math.log(math.expm1(0.9))))  # scale 1
        self.canonical_ids: Tensor
        self.multipliers: Tensor
        self.table_sizes: Tensor
        self.table_starts: Tensor
        self.register_buffer("canonical_ids", torch.arange(config.vocab_size))
        self.register_buffer("multipliers", hash_multipliers(layer, self.orders))
        shape = (len(self.orders), self.heads)
        self.register_buffer("table_sizes", torch.tensor(primes).view(shape))
        starts = torch.tensor([0, *primes[:-1]]).cumsum(0)
        self.register_buffer("table_starts", starts.view(shape))
        self._last_keys: Tensor | None = None
        self._last_gate: Tensor | None = None

    @property
    def num_idle_parameters(self) -> int:
        """Table values that one token does not read."""
        return self.table.numel() - len(self.orders) * self.heads * self.table.shape[1]

    def forward(
        self,
        hidden: Tensor,
        input_ids: Tensor,
        context: SequenceContext,
        *,
        state: EngramState | None = None,
    ) -> tuple[Tensor, EngramState | None]:
        """hidden (B, T, D), input_ids (B, T) -> addition to the residual stream, new state."""
        ids = self.canonical_ids[input_ids]
        if context.valid_mask is not None:
            ids = ids.masked_fill(~context.valid_mask, self.missing_id)
        if state is None:
            state = self._empty_state(hidden)
        keys, next_ids = self._ngram_keys(ids, context, state.ids)  # (B, T, O)
        rows = keys.unsqueeze(-1) % self.table_sizes + self.table_starts  # (B, T, O, K)
        memory = F.embedding(rows, self.table).flatten(2)  # (B, T, O K dim)
        key, value = self.key_value(memory).chunk(2, dim=-1)
        gate = self._gate(hidden, key)  # (B, T, 1)
        value = gate.to(value.dtype) * value
        smoothed, tail = self._short_conv(self.conv_norm(value), context, state.tail)
        if self.training:
            self._last_keys, self._last_gate = keys.detach(), gate.detach()
        new_state = EngramState(next_ids, tail) if context.use_cache else None
        return value + F.silu(smoothed), new_state

    def _empty_state(self, hidden: Tensor) -> EngramState:
        batch, _, width = hidden.shape
        ids = torch.full(
            (batch, max(self.orders) - 1), self.missing_id, device=hidden.device, dtype=torch.int64
        )
        return EngramState(ids, hidden.new_zeros(batch, (CONV_KERNEL - 1) * self.dilation, width))

    def _ngram_keys(
        self, ids: Tensor, context: SequenceContext, previous: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hash of each order's n-gram that ends at each token, (B, T, O); and the next state."""
        length, reach = ids.shape[1], previous.shape[1]
        row = torch.cat((previous, ids), dim=1)  # (B, reach + T)
        documents = _extended_documents(context, reach)
        lagged = []
        for lag in range(reach + 1):
            seen = row[:, reach - lag : reach - lag + length]
            if documents is not None and lag:
                same = documents[:, reach - lag : reach - lag + length] == documents[:, reach:]
                seen = seen.masked_fill(~same, self.missing_id)
            lagged.append(seen)
        keys = []
        for index, order in enumerate(self.orders):
            key = lagged[0] * self.multipliers[index, 0]
            for lag in range(1, order):
                key = key ^ (lagged[lag] * self.multipliers[index, lag])
            keys.append(key)
        latest = row[:, length:]
        if documents is not None:
            latest = latest.masked_fill(documents[:, length:] != documents[:, -1:], self.missing_id)
        return torch.stack(keys, dim=-1), latest

    def _gate(self, hidden: Tensor, key: Tensor) -> Tensor:
        """How far the memory is let in, (B, T, 1) in (0, 1); fp32."""
        query = self.query_norm(hidden).float()
        agreement = torch.linalg.vecdot(query, self.key_norm(key).float()).unsqueeze(-1)
        agreement = agreement / math.sqrt(hidden.shape[-1])
        root = agreement.abs().clamp_min(_MIN_AGREEMENT).sqrt() * agreement.sign()
        scale = (F.softplus(self.gate_scale) + 0.1).clamp(*GATE_SCALE_RANGE)
        return torch.sigmoid(scale * root)

    def _short_conv(
        self, values: Tensor, context: SequenceContext, tail: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Depthwise causal convolution of values (B, T, D), continued from tail; the new tail."""
        if context.valid_mask is not None:
            values = values * context.valid_mask.unsqueeze(-1).to(values.dtype)
        length, reach = values.shape[1], tail.shape[1]
        row = torch.cat((tail.to(values.dtype), values), dim=1)  # (B, reach + T, D)
        documents = _extended_documents(context, reach)
        total = values * self.conv_weight[0]
        for tap in range(1, CONV_KERNEL):
            start = reach - tap * self.dilation
            seen = row[:, start : start + length]
            if documents is not None:
                same = documents[:, start : start + length] == documents[:, reach:]
                seen = seen * same.unsqueeze(-1).to(seen.dtype)
            total = torch.addcmul(total, seen, self.conv_weight[tap].to(seen.dtype))
        latest = row[:, length:]
        if documents is not None:
            same = documents[:, length:] == documents[:, -1:]
            latest = latest * same.unsqueeze(-1).to(latest.dtype)
        return total, latest

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Gate and collision figures of the last training forward. Synchronises the device."""
        if self._last_gate is None or self._last_keys is None:
            return {}
        gate = self._last_gate.float()
        saturated = ((gate < 0.05) | (gate > 0.95)).float().mean()
        return {
            "eng_gate_mean": float(gate.mean()),
            "eng_gate_std": float(gate.std(correction=0)),
            "eng_gate_sat": float(saturated),
            "eng_collision_rate": self.collision_rate(self._last_keys),
        }

    def collision_rate(self, keys: Tensor) -> float:
        """Share of the distinct n-grams in keys (..., O) whose row another of them uses too.

        Mean over orders and heads; for U distinct n-grams and P rows chance alone gives
        1 - (1 - 1/P)^(U - 1).
        """
        rates = []
        for index in range(len(self.orders)):
            distinct = keys[..., index].unique()
            for size in self.table_sizes[index].tolist():
                _, inverse, counts = (distinct % size).unique(
                    return_inverse=True, return_counts=True
                )
                rates.append(float((counts[inverse] > 1).double().mean()))
        return sum(rates) / len(rates)


def _extended_documents(context: SequenceContext, reach: int) -> Tensor | None:
    """Document number of the `reach` positions before this forward (0) and of its own, or None."""
    if context.document_ids is None:
        return None
    return F.pad(context.document_ids, (reach, 0))


def hash_multipliers(layer: int, orders: Sequence[int]) -> Tensor:
    """Odd factors (orders, max order) int64, a fixed function of (layer, order, position).

    Not drawn from the model's seed: a table is worthless under other factors.
    """
    factors = []
    for order in orders:
        row = [_splitmix(layer, order, position) for position in range(max(orders))]
        factors.append([(value >> (64 - _MULTIPLIER_BITS)) | 1 for value in row])
    return torch.tensor(factors)


def _splitmix(*words: int) -> int:
    """64 well-mixed bits of some small integers (the splitmix64 finaliser, chained)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def nearest_primes(target: int, count: int) -> list[int]:
    """The `count` primes closest to target, nearest first; of two equally near, the smaller."""
    if target < 2 or count < 1:
        raise ValueError("--engram-buckets must be at least 2 and tables at least one")
    primes: list[int] = []
    distance = 0
    while len(primes) < count:
        for candidate in dict.fromkeys((target - distance, target + distance)):
            if _is_prime(candidate):
                primes.append(candidate)
        distance += 1
    return primes[:count]


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % factor for factor in range(2, math.isqrt(value) + 1))


def canonical_token_map(decoded_pieces: Sequence[str]) -> Tensor:
    """Id of the first token that reads the same, (V,) int64: case, accents and spacing ignored.

    decoded_pieces: text of every token. Pieces that are not valid text by themselves (they contain
    the replacement character) or are empty keep their own id.
    """
    first: dict[str, int] = {}
    mapped = []
    for token, piece in enumerate(decoded_pieces):
        form = _canonical_form(piece)
        mapped.append(token if form is None else first.setdefault(form, token))
    return torch.tensor(mapped, dtype=torch.int64)


def merge_canonical_ids(model: nn.Module, decoded_pieces: Sequence[str]) -> None:
    """Let the memories in `model` take tokens that read the same for one: `canonical_token_map`."""
    ids = canonical_token_map(decoded_pieces)
    for module in model.modules():
        if isinstance(module, Engram):
            module.canonical_ids.copy_(ids)


def _canonical_form(piece: str) -> str | None:
    if not piece or "\ufffd" in piece:
        return None
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", piece))
    text = "".join(char for char in text if unicodedata.category(char) != "Mn").lower()
    return re.sub(r"\s+", " ", text).strip() or " "
