"""How hand-written gradients are called, so that torch.compile leaves them as they are.

They write into buffers that are views of others (`out=`, in-place products). Dynamo binds the
result of such a call to a new tensor and forgets the buffer behind the view: a compiled scan gave
other values than the eager one, without a word. They are few and large, so that a graph that ends
at each of them loses little.

`torch.compiler.disable` imports the compiler, which costs as much as torch itself. So the boundary
is drawn when a model is compiled, not when this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Boundary:
    """Calls autograd functions; after `draw`, outside every graph."""

    call: Callable[..., Any]

    def __init__(self) -> None:
        self.call = _apply

    def draw(self) -> None:
        if self.call is _apply:
            self.call = torch.compiler.disable(_apply)


class _NoGraph:
    """Stands where a function would keep things for backward; there is none without gradients."""

    def __init__(self, num_inputs: int) -> None:
        self.needs_input_grad = (False,) * num_inputs

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    if torch.is_grad_enabled():
        return function.apply(*args)
    return function.forward(_NoGraph(len(args)), *args)


_BOUNDARY = _Boundary()


def apply_opaque(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), never traced."""
    return _BOUNDARY.call(function, *args)


def compile_model(
    model: nn.Module, *, backend: str, mode: str, dynamic: bool
) -> Callable[..., Any]:
    """The compiled call of `model`, hand-written gradients as they are."""
    _BOUNDARY.draw()
    return torch.compile(model, backend=backend, mode=mode, dynamic=dynamic)
