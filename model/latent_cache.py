"""What latent attention keeps of earlier tokens, in buffers that grow by doubling."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.attention import PADDING


@dataclass(slots=True)
class _Watermark:
    """How many tokens of a shared buffer are taken, by whichever state wrote last."""

    taken: int


@dataclass(slots=True, kw_only=True)
class LatentCache:
    """State of one MLA layer: what earlier tokens left for later ones.

    latent (B, capacity, d_c) after its norm; rotary_key (B, capacity, d_R) after rotation;
    documents (B, capacity) int32 as in `attention.context_documents`, None while all tokens are
    valid and of one document; length: tokens held. Buffers grow by doubling. States are values: a
    state stays usable after another was derived from it, because only the newest one may extend
    a shared buffer in place.
    """

    latent: Tensor
    rotary_key: Tensor
    documents: Tensor | None = None
    length: int = 0
    watermark: _Watermark = field(default_factory=lambda: _Watermark(0), repr=False)

    def append(self, latent: Tensor, rotary_key: Tensor, documents: Tensor | None) -> LatentCache:
        """State after T more tokens: latent (B, T, d_c), rotary_key (B, T, d_R), documents (B, T).

        Document numbers count from the first new token; they are shifted to continue the row's.
        """
        count = latent.shape[1]
        old = self.documents
        if documents is None and old is not None:
            documents = old.new_zeros(latent.shape[:2])
        elif documents is not None and old is None:
            old = documents.new_zeros(documents.shape[0], self.latent.shape[1])
        if documents is not None and old is not None and self.length:
            last = old[:, : self.length].amax(1, keepdim=True).clamp_min(0)
            documents = torch.where(documents == PADDING, documents, documents + last)
        in_place = old is self.documents and self._extensible(count, latent)
        mark = self.watermark if in_place else _Watermark(0)
        mark.taken = self.length + count
        pairs = ((self.latent, latent), (self.rotary_key, rotary_key), (old, documents))
        buffers = [self._joined(buffer, new, in_place) for buffer, new in pairs]
        assert buffers[0] is not None and buffers[1] is not None
        return LatentCache(
            latent=buffers[0],
            rotary_key=buffers[1],
            documents=buffers[2],
            length=self.length + count,
            watermark=mark,
        )

    def _extensible(self, count: int, new: Tensor) -> bool:
        fits = self.length + count <= self.latent.shape[1]
        newest = self.watermark.taken == self.length
        # Writing into a tensor that a graph holds would spoil that graph's backward.
        differentiable = self.latent.requires_grad or (
            torch.is_grad_enabled() and new.requires_grad
        )
        foreign = self.latent.is_inference() and not torch.is_inference_mode_enabled()
        return fits and newest and not differentiable and not foreign

    def _joined(self, buffer: Tensor | None, new: Tensor | None, in_place: bool) -> Tensor | None:
        if buffer is None or new is None:
            return None
        stop = self.length + new.shape[1]
        if in_place:
            buffer[:, self.length : stop] = new
            return buffer
        held = buffer[:, : self.length]
        capacity = max(stop, 2 * self.length) if self.length else stop
        grown = buffer.new_empty(buffer.shape[0], capacity, *buffer.shape[2:])
        grown[:, : self.length] = held
        grown[:, self.length : stop] = new
        return grown

    def reorder(self, index: Tensor) -> LatentCache:
        """State of the rows picked by index (B',) int64, for beam search."""
        documents = None
        if self.documents is not None:
            documents = self.documents[:, : self.length].index_select(0, index)
        return LatentCache(
            latent=self.latent[:, : self.length].index_select(0, index),
            rotary_key=self.rotary_key[:, : self.length].index_select(0, index),
            documents=documents,
            length=self.length,
            watermark=_Watermark(self.length),
        )

    def bytes_per_token(self) -> float:
        """Bytes that one token of one row occupies in the used part of the buffers."""
        parts = [self.latent, self.rotary_key]
        if self.documents is not None:
            parts.append(self.documents)
        used = sum(part[:, : self.length].numel() * part.element_size() for part in parts)
        return used / max(1, self.length * self.latent.shape[0])
