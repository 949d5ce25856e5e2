"""Low-rank additions to the projections of latent attention, held beside the model, not in it.

    y <- y + x A^T B^T * alpha / r       A (r, in), B (out, r), B = 0 at first

The ternary weight and its codes stay what they are: the addition is computed in full precision from
the same input. An adapter is no part of the model's parameters and state, so that without one the
model is the same object to the bit, and its hash does not depend on what is attached.

Source: LoRA 2106.09685.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.bitlinear import BitLinear, LowRank
from model.mla import MLA


def adapted_layers(model: nn.Module) -> dict[str, BitLinear]:
    """The projections of every attention layer, by name."""
    return {
        f"{name}.{child}": layer
        for name, module in model.named_modules()
        if isinstance(module, MLA)
        for child, layer in module.named_children()
        if isinstance(layer, BitLinear)
    }


class Adapter:
    """Factors for every adapted layer of one model; `attached` puts them to work."""

    def __init__(self, layers: dict[str, LowRank]) -> None:
        self.layers = layers

    @classmethod
    def create(
        cls, model: nn.Module, *, rank: int, alpha: float, generator: torch.Generator
    ) -> Adapter:
        """An adapter that adds nothing yet. ValueError without attention or above a layer's width.

        `generator` (on the CPU) draws A uniformly within 1 / sqrt(in).
        """
        layers = {}
        for name, layer in adapted_layers(model).items():
            if rank > min(layer.in_features, layer.out_features):
                raise ValueError(
                    f"--hydra-lora-rank {rank} is more than {name} has: "
                    f"{layer.out_features} x {layer.in_features}"
                )
            down = torch.rand(rank, layer.in_features, generator=generator) * 2.0 - 1.0
            down *= layer.in_features**-0.5
            up = torch.zeros(layer.out_features, rank)
            home, dtype = layer.weight.device, layer.weight.dtype
            layers[name] = LowRank(
                down=down.to(home, dtype).requires_grad_(),
                up=up.to(home, dtype).requires_grad_(),
                scale=alpha / rank,
            )
        if not layers:
            raise ValueError("--hydra-enable adapts attention layers and the model has none")
        return cls(layers)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """`<layer>.down` (r, in) and `<layer>.up` (out, r) of every adapted layer: the tensors
        themselves."""
        for name, layer in self.layers.items():
            yield f"{name}.down", layer.down
            yield f"{name}.up", layer.up

    @torch.no_grad()
    def products(self) -> dict[str, Tensor]:
        """B A alpha / r (out, in) of every layer: what is added to its weight."""
        return {name: layer.product() for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the factors, by name."""
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write the factors in place. ValueError when names or shapes are not these."""
        own = dict(self.named_parameters())
        if own.keys() != state.keys():
            raise ValueError("the saved adapter is one of another network")
        for name, value in own.items():
            if value.shape != state[name].shape:
                raise ValueError(f"the saved adapter has another shape or rank in {name}")
            value.copy_(state[name])

    def digest(self) -> str:
        """sha256 of all factors, by name."""
        found = hashlib.sha256()
        for name, value in sorted(self.named_parameters()):
            found.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(data.numpy().tobytes())
        return found.hexdigest()


def attach(model: nn.Module, adapter: Adapter | None) -> None:
    """From now on the model has what the adapter adds, None = nothing."""
    for name, layer in adapted_layers(model).items():
        layer.adapter = None if adapter is None else adapter.layers[name]


@contextmanager
def attached(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """The model with what the adapter adds, None = with nothing; afterwards as it was."""
    layers = adapted_layers(model)
    before = {name: layer.adapter for name, layer in layers.items()}
    try:
        attach(model, adapter)
        yield
    finally:
        for name, layer in layers.items():
            layer.adapter = before[name]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's own parameters without gradient; afterwards as they were."""
    trained = [param for param in model.parameters() if param.requires_grad]
    try:
        for param in trained:
            param.requires_grad_(False)
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)


@torch.no_grad()
def fold(model: nn.Module, products: Mapping[str, Tensor]) -> None:
    """Add the products to the latent weights in place; held codes notice by the version.

    Of ternary weights the codes are those of the sum then, not the old ones plus the product.
    """
    layers: dict[str, Any] = adapted_layers(model)
    for name, product in products.items():
        weight = layers[name].weight
        weight.add_(product.to(weight.dtype))
