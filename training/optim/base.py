"""The one interface of all optimizers: propose a direction per parameter, then apply it.

`step` goes bucket by bucket: `propose` advances the state and returns directions, an optional
adjustment may change them (a trust region, a credit), and then, with an optional scale s,

    p <- (1 - lr * weight_decay) * p - lr * gain * s * direction

Splitting the two lets credit and trust region work on any base update without knowing it. Without
scales and adjustment nothing is multiplied by one: the arithmetic is that of the plain optimizer.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Update:
    """What a bucket of parameters is about to undergo: p <- decayed p - lr * gain * direction.

    `directions` belong to the update: an adjustment may write to them or replace them.
    """

    params: list[Tensor]
    directions: list[Tensor]
    gain: float
    group: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Dormant:
    """Slices of a stack without a gradient, and what they and their state were before the step."""

    param: Tensor
    index: Tensor
    values: Tensor
    state: dict[str, Tensor]


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients of parameters that all have one."""
    return [param.grad for param in params if param.grad is not None]


Scale = float | Tensor
Adjustment = Callable[[Update], None]


class ScaledOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose updates can be scaled and adjusted from outside.

    Scales, adjustment and switches are no state of the optimizer: who sets them saves them.
    A parameter without a gradient is left alone: no decay, no drift of its momentum. The same holds
    for each slice of a stack named by `watch_stacks` (an expert to which no token was routed).
    """

    foreach = True  # False: every parameter is a bucket of its own
    _scales: dict[Tensor, Scale] | None = None
    _adjustment: Adjustment | None = None
    _stacks: tuple[Tensor, ...] = ()

    # torch's own, without the mark for compiled optimizer steps that wraps them: its first use
    # loads the whole tracer of torch.compile, which is a third of what a start costs.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @abstractmethod
    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        """Advance the state of `params`, which all have gradients, and return their directions."""

    def bucket_key(self, param: Tensor) -> Hashable:
        """Parameters with equal keys are proposed for together."""
        return param.device, param.dtype

    def metrics(self) -> dict[str, float]:
        """Columns this optimizer adds to the metrics row. May wait for the device."""
        return {}

    def set_scales(self, scales: Mapping[Tensor, Scale] | None) -> None:
        """Multiply each named parameter's direction from now on; None: no multiplication at all.

        A scale is a number or a tensor that broadcasts to the parameter. Decay is never scaled.
        ValueError for a parameter that is not this optimizer's.
        """
        if scales is not None:
            own = {id(param) for group in self.param_groups for param in group["params"]}
            if any(id(param) not in own for param in scales):
                raise ValueError("set_scales: a scale names a parameter of another optimizer")
        self._scales = None if scales is None else dict(scales)

    def set_adjustment(self, adjustment: Adjustment | None) -> None:
        """Let `adjustment` see, and change, every bucket's directions before they are applied."""
        self._adjustment = adjustment

    def watch_stacks(self, params: Iterable[Tensor]) -> None:
        """Treat slices along the first dimension of these parameters as parameters of their own:
        one whose gradient is exactly zero is left alone, with its state."""
        self._stacks = tuple(params)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure")
        dormant = self._dormant_slices()
        for group in self.param_groups:
            for params in self._buckets(group):
                self._step_bucket(params, group)
        for part in dormant:
            self._restore(part)

    def apply_plainly(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The update when nobody scales or adjusts."""
        self._apply(self.propose(params, group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but every state tensor keeps the dtype it was saved in."""
        inspect.unwrap(torch.optim.Optimizer.load_state_dict)(self, state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(indices, params):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = param.device if value.dim() else value.device
                    self.state[param][key] = value.detach().to(device).clone()

    def moment(self, param: Tensor, key: str, shape: Iterable[int] | None = None) -> Tensor:
        """State tensor of a parameter, at first zeros of its own shape or of the given one."""
        state = self.state[param]
        if key not in state:
            sizes = param.shape if shape is None else tuple(shape)
            state[key] = torch.zeros(sizes, dtype=param.dtype, device=param.device)
        return state[key]

    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        live = [param for param in group["params"] if param.grad is not None]
        if not self.foreach:
            yield from ([param] for param in live)
            return
        buckets: dict[Hashable, list[Tensor]] = defaultdict(list)
        for param in live:
            buckets[self.bucket_key(param)].append(param)
        yield from buckets.values()

    def _step_bucket(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if self._scales is None and self._adjustment is None:
            self.apply_plainly(params, group)
            return
        update = self.propose(params, group)
        if self._adjustment is not None:
            self._adjustment(update)
        if self._scales is not None:
            for param, direction in zip(params, update.directions):
                if param in self._scales:
                    direction.mul_(self._scales[param])
        self._apply(update)

    def _apply(self, update: Update) -> None:
        lr, decay = update.group["lr"], update.group["weight_decay"]
        if decay:
            torch._foreach_mul_(update.params, 1.0 - lr * decay)
        torch._foreach_add_(update.params, update.directions, alpha=-lr * update.gain)

    def _dormant_slices(self) -> list[_Dormant]:
        stacks = [param for param in self._stacks if param.grad is not None]
        if not stacks:
            return []
        largest = torch.cat([grad.flatten(1).abs().amax(1) for grad in gradients(stacks)])
        live = largest != 0
        if bool(live.all()):  # the only wait for the device
            return []
        return [
            self._remember(param, alive)
            for param, alive in zip(stacks, live.split([len(param) for param in stacks]))
            if not bool(alive.all())
        ]

    def _remember(self, param: Tensor, alive: Tensor) -> _Dormant:
        index = (~alive).nonzero().flatten()
        state = {
            key: value[index].clone()
            for key, value in self.state.get(param, {}).items()
            if isinstance(value, Tensor) and value.dim() and len(value) == len(param)
        }
        return _Dormant(param=param, index=index, values=param[index].clone(), state=state)

    def _restore(self, dormant: _Dormant) -> None:
        dormant.param.index_copy_(0, dormant.index, dormant.values)
        for key, value in dormant.state.items():
            self.state[dormant.param][key].index_copy_(0, dormant.index, value)
