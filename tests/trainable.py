"""Models that may be trained: patched by INSTANT, by default so that nothing changes."""

from typing import TypeVar

from torch import nn

from training.instant import InstantSettings, apply_instant

Model = TypeVar("Model", bound=nn.Module)


def patched(model: Model, **settings) -> Model:
    """The model with the INSTANT patch (mode off unless given otherwise)."""
    apply_instant(model, InstantSettings(**settings))
    return model
