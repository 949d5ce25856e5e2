"""Saved activations as codes of 4, 5, 6 or 8 bits, unbiased by noise that is drawn twice.

A number in steps gets noise u in [0, 1) before it is cut to a whole code. Left at that, it is
stochastic rounding: a number at f between two codes ends at either, with variance f (1 - f), 1/6 of
a squared step on average. Subtracted dither takes the very same noise, drawn again from its seed,
off when the code is read: the error is uniform in half a step either way, whatever the number was,
with variance 1/12. That is the rule. Groups whose least number is 0 are rounded instead, which the
sign of their step tells: so zeros of a masked map stay zeros, and no gradient passes through them.

Groups of neighbours share an offset and a step, so that one outlier costs few numbers their
precision: 64, and 32 at 4 bits, where steps are widest. Both span the group's own range, not one
around zero, and are bf16, rounded so that the range is never cut.

A matrix may first be split into its part in a low-rank basis, kept in bf16, and a remainder with a
smaller range, which is what the codes then hold. Numbers that are small integers already (the int8
codes of ternary layers) are kept as such, without loss.

Sources: Roberts 1962 and Schuchman 1964 (subtractive dither); ActNN 2104.14129, GACT 2206.11357
(group-wise codes of activations); CompAct 2410.15352 and INSTANT (OpenReview P2q6Y7UweV) for
projections of activations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALE_BITS = 32  # offset and step of a group
_BLOCK = 2**18  # numbers coded at once: what stays in a core's cache
_MIN_STEP = 1e-30
_BF16_SLACK = 2.0**-8  # twice bf16's rounding error


def group_size(bits: int) -> int:
    """Numbers that share an offset and a step."""
    return 32 if bits == 4 else 64


class Codes(NamedTuple):
    """Numbers as unsigned codes: value = low + (code + 1/2 - u) step of the number's group, with u
    the noise of `seed`; where the step is negative, value = low + code |step|.

    codes: uint8, `bits` bytes for 8 numbers, see `_join_bits`; low, step: (groups,) bf16.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    seed: int
    bits: int
    size: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return sum(_bytes(part) for part in (self.codes, self.low, self.step))

    def decode(self) -> Tensor:
        """The numbers (size,) in their first dtype."""
        groups, device = self.low.numel(), self.low.device
        result = torch.empty(groups, group_size(self.bits), dtype=self.dtype, device=device)
        wide = torch.promote_types(self.dtype, torch.float32)
        draws = torch.Generator(device).manual_seed(self.seed)
        rows = _BLOCK // group_size(self.bits)
        packed = self.codes.view(groups, -1)
        for start in range(0, groups, rows):
            part = slice(start, start + rows)
            values = _split_bits(packed[part], self.bits).to(wide)
            noise = uniform(values.shape, generator=draws)
            step = self.step[part].to(wide).unsqueeze(1)
            values.add_(noise.neg_().add_(0.5).mul_(step > 0.0)).mul_(step.abs())
            result[part] = values.add_(self.low[part].to(wide).unsqueeze(1))
        return result.view(-1)[: self.size]


class Integers(NamedTuple):
    """Numbers that are integer multiples of `unit` up to 127, exactly."""

    codes: Tensor
    unit: float
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return _bytes(self.codes)

    def decode(self) -> Tensor:
        """The numbers in their original dtype; of an int8 tensor the codes themselves, not a
        copy."""
        values = self.codes.to(self.dtype)
        return values if self.unit == 1.0 else values.mul_(self.unit)


class LowRank(NamedTuple):
    """A (rows, D) ~ parts @ basis^T + the decoded remainder; the basis (D, r) is shared."""

    parts: Tensor
    basis: Tensor
    rest: Codes

    @property
    def num_bytes(self) -> int:
        return _bytes(self.parts) + self.rest.num_bytes

    def decode(self) -> Tensor:
        """The numbers, flat (rows * D,), in the remainder's dtype; summed in the basis's."""
        wide = self.basis.dtype
        values = self.rest.decode().to(wide).view(-1, len(self.basis))
        return values.addmm_(self.parts.to(wide), self.basis.mT).view(-1).to(self.rest.dtype)


Packed = Codes | Integers | LowRank


def encode(values: Tensor, *, bits: int, seed: int) -> Codes:
    """Codes of `bits` (4, 5, 6 or 8) for values (n,) of a floating type; `seed` of the noise."""
    size, levels, width = values.numel(), 2**bits - 1, group_size(bits)
    groups = -(-size // width)
    device = values.device
    codes = torch.empty(groups, width * bits // 8, dtype=torch.uint8, device=device)
    low = torch.empty(groups, dtype=torch.bfloat16, device=device)
    step = torch.empty_like(low)
    wide = torch.promote_types(values.dtype, torch.float32)
    draws = torch.Generator(device).manual_seed(seed)
    rows = _BLOCK // width
    for start in range(0, groups, rows):
        part = values[start * width : (start + rows) * width]
        if missing := -part.numel() % width:
            part = torch.cat((part, part[-1:].expand(missing)))
        part = part.view(-1, width).to(wide)
        least, most = torch.aminmax(part, dim=1, keepdim=True)
        floor = (least - least.abs() * _BF16_SLACK).bfloat16()
        unit = ((most - floor) * ((1.0 + _BF16_SLACK) / levels)).bfloat16()  # 0 for zeros alone
        scaled = (part - floor.to(wide)).div_(unit.to(wide).clamp_min_(_MIN_STEP))
        whole = scaled.add_(uniform(scaled.shape, generator=draws)).to(torch.uint8)
        block = slice(start, start + len(part))
        codes[block] = _join_bits(whole, bits)
        low[block] = floor.squeeze(1)
        step[block] = torch.where(least == 0.0, -unit, unit).squeeze(1)
    return Codes(codes.view(-1), low, step, seed, bits, size, values.dtype)


def _join_bits(codes: Tensor, bits: int) -> Tensor:
    """(rows, group) uint8 below 2^bits -> (rows, group bits / 8).

    The low four bits of two neighbours share a byte; each further bit is a plane of its own, eight
    numbers in a byte.
    """
    if bits == 8:
        return codes
    planes = [(codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)]
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    for place in range(4, bits):
        plane = ((codes >> place) & 1).view(len(codes), -1, 8) << places
        planes.append(plane.sum(-1, dtype=torch.uint8))
    return torch.cat(planes, dim=1)


def _split_bits(joined: Tensor, bits: int) -> Tensor:
    """Inverse of `_join_bits`."""
    if bits == 8:
        return joined
    width = group_size(bits)
    low, *planes = joined.split([width // 2, *[width // 8] * (bits - 4)], dim=1)
    codes = torch.stack((low & 15, low >> 4), dim=-1).flatten(1)
    places = torch.arange(8, dtype=torch.uint8, device=joined.device)
    for place, plane in enumerate(planes, start=4):
        codes |= (((plane.unsqueeze(-1) >> places) & 1) << place).flatten(1)
    return codes


def encode_low_rank(values: Tensor, *, basis: Tensor, bits: int, seed: int) -> LowRank:
    """values (n,), n a multiple of D, by their part in the orthonormal basis (D, r) and the rest.

    The rest is taken from the rounded part, so that nothing is lost but by its own codes.
    """
    matrix = values.view(-1, len(basis)).to(basis.dtype)
    parts = (matrix @ basis).bfloat16()
    rest = torch.addmm(matrix, parts.to(basis.dtype), basis.mT, alpha=-1.0)
    codes = encode(rest.view(-1).to(values.dtype), bits=bits, seed=seed)
    return LowRank(parts, basis, codes)


def find_basis(matrix: Tensor, *, rank: int, seed: int) -> Tensor:
    """Orthonormal (D, rank) fp32 that holds most of the rows of matrix (rows, D).

    One subspace iteration from random directions, on at most 4,096 evenly spaced rows.
    """
    rows = matrix[:: max(1, len(matrix) // 4096)].float()
    draws = torch.Generator(rows.device).manual_seed(seed)
    start = torch.randn(rows.shape[1], rank, generator=draws, device=rows.device)
    basis = torch.linalg.qr(rows.mT @ (rows @ start)).Q
    return torch.linalg.qr(rows.mT @ (rows @ basis)).Q


def as_integers(values: Tensor) -> Integers | None:
    """values (n,) exactly, when all are integers up to 127 (or, in 16-bit types, 128ths)."""
    units = (1.0, 1.0 / 128.0) if values.dtype.itemsize == 2 else (1.0,)
    for unit in units:
        scaled = values if unit == 1.0 else values / unit
        codes = scaled.to(torch.int8)
        if torch.equal(codes.to(values.dtype), scaled):
            return Integers(codes, unit, values.dtype)
    return None


def uniform(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    """fp32 numbers in [0, 1) on a grid of 2^-16, four from every 64-bit draw."""
    size = shape.numel()
    draws = torch.empty(-(-size // 4), dtype=torch.int64, device=generator.device)
    draws.random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:size].float().mul_(2.0**-16).add_(0.5).view(shape)


def relative_error(packed: Packed, values: Tensor) -> float:
    """||decode - values|| / ||values||, 0 for all-zero values; waits for the device."""
    wide = torch.promote_types(values.dtype, torch.float32)
    gap = (packed.decode().to(wide) - values.to(wide)).norm()
    return float(gap / values.to(wide).norm().clamp_min(1e-30))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
