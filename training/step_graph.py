"""Micro-batches by CUDA graph: forward and backward captured once, then replayed without Python.

At 4 x 512 tokens a step is 1,500 to 3,000 launches that take longer than their kernels. A graph
repeats the launches it captured on the same addresses: what Python decided then stays decided.

- The first runs of a shape are ordinary ones, on the stream of the capture (gradient accumulators
  remember theirs, libraries set themselves up). They train like any other.
- Two pairs of graphs. That of a step's first micro-batch makes the ternary codes and *writes* the
  gradients; that of the others uses those codes and *adds*, and runs only after the first one. So
  codes are those of the step's weights, made once, and nothing needs zeroing. Codes that somebody
  else made are never captured: they would stay what they were.
- What decides the model's path is compared at every step: shape, number of parts, plain values of
  every module, addresses of weights and buffers. Another path is captured anew; one is kept.
- Tensors that modules keep of a forward, for the metrics, are put back after each replay.
- Random numbers are the device generator's, whose offset a replay advances as the launches would.

Gradients and the pool of activations stay allocated between steps: that is the price in memory. A
loss that only some micro-batches have cannot be captured; the configuration refuses it.

Sources: torch's notes on CUDA graphs; `torch.cuda.make_graphed_callables` (forward and backward as
graphs of one pool); Transformer Engine, whose first micro-batch alone casts the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from traceback import walk_tb
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.weight_cache import TernaryCache
from training.micro_pass import EagerPass
from training.runtime.memory_guard import is_out_of_memory
from training.stream.batch import Batch

WARM_UP_RUNS = 3  # micro-batches; torch's own number
INPUTS = ("input_ids", "labels", "reset_mask")
BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}  # of torch
PLAIN = frozenset((bool, int, float, str, tuple))
LEFT_BEHIND = (list, set, dict, Tensor, type(None))


class Graphs(Protocol):
    """warm_up: the block runs on the stream of the captures. capture: its device work is recorded,
    not done; gives what has `replay()`. renew: a new pool of memory, all graphs being gone."""

    def warm_up(self) -> AbstractContextManager[None]: ...
    def capture(self) -> AbstractContextManager[Any]: ...
    def renew(self) -> None: ...


class CudaGraphs:
    """The `Graphs` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self.renew()

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    @contextmanager
    def capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        # Saves and prefetch, on other threads, may go on using the device meanwhile.
        mode = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **mode):
            yield graph

    def renew(self) -> None:
        torch.cuda.synchronize(self._device)  # the last replay may still be running
        self._pool = torch.cuda.graph_pool_handle()


@dataclass(slots=True)
class _Pair:
    """Graphs of one kind of micro-batch. kept: tensors that modules held before the capture, then
    those that the captured passes left with them."""

    forward: Any
    outputs: Any
    kept: dict[tuple[nn.Module, str], Tensor]
    backward: Any = None


class StepGraph:
    """A MicroPass that runs the first micro-batches of a shape and replays all later ones."""

    def __init__(self, eager: EagerPass, *, model: nn.Module, graphs: Graphs) -> None:
        self._eager = eager
        self._model = model
        self._graphs = graphs
        self.num_captures = self.num_replays = 0
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory; the next micro-batches are ordinary ones until a new
        capture."""
        self._graphs.renew()
        self._modules = tuple(self._model.modules())
        self._key: Hashable = None
        self._runs = 0
        self._first: _Pair | None = None
        self._later: _Pair | None = None
        self._current: _Pair | None = None  # between a replayed forward and its backward
        self._is_begun = False  # the first micro-batch of this step was replayed
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._codes = TernaryCache()
        self._inputs: dict[str, Tensor] = {}

    def metrics(self) -> dict[str, float]:
        """Pairs of graphs captured, and micro-batches replayed by them, in this process so far."""
        return {"cuda_graph_captures": self.num_captures, "cuda_graph_replays": self.num_replays}

    def forward(self, batch: Batch, *, micro: int, parts: int) -> Any:
        if micro == 0:
            self._begin_step((parts, batch.input_ids.shape, path_of(self._modules)))
        self._load(batch)
        batch = replace(batch, **self._inputs)
        is_ready = self._is_begun if micro else self._runs >= WARM_UP_RUNS
        if not is_ready:
            with self._graphs.warm_up():
                return self._eager.forward(batch, micro=micro, parts=parts)
        if micro == 0:
            pair = self._first = self._first or self._capture_forward(batch, micro, parts)
        else:
            pair = self._later = self._later or self._capture_forward(batch, micro, parts)
        pair.forward.replay()
        self._current, self._is_begun = pair, True
        return pair.outputs

    def backward(self, total_loss: Callable[[], Tensor], *, parts: int) -> None:
        pair, self._current = self._current, None
        if pair is None:
            with self._graphs.warm_up():
                self._eager.backward(total_loss, parts=parts)
            self._runs += 1
            return
        pair.backward = pair.backward or self._capture_backward(pair, total_loss, parts)
        pair.backward.replay()
        self.num_replays += 1
        for param, gradient in self._gradients:
            param.grad = gradient
        for (module, name), value in pair.kept.items():
            vars(module)[name] = value

    def _begin_step(self, key: Hashable) -> None:
        if key != self._key:
            self.forget()
            self._key = key
        self._is_begun, self._current = False, None

    def _load(self, batch: Batch) -> None:
        """Copy the batch to where the graphs read it; a step's micro-batches have one shape."""
        for name in INPUTS:
            value = getattr(batch, name)
            if name in self._inputs:
                self._inputs[name].copy_(value, non_blocking=True)
            else:
                self._inputs[name] = value.clone()

    def _capture_forward(self, batch: Batch, micro: int, parts: int) -> _Pair:
        if micro == 0:
            self._codes = TernaryCache()
        before = kept_tensors(self._model)
        with self._capturing("forward") as graph:
            outputs = self._eager.forward(batch, micro=micro, parts=parts)
        return _Pair(graph, outputs, before)

    def _capture_backward(self, pair: _Pair, total_loss: Callable[[], Tensor], parts: int) -> Any:
        with self._capturing("backward") as graph:
            self._eager.backward(total_loss, parts=parts)
        if pair is self._first:
            params = self._model.parameters()
            self._gradients = [(p, p.grad) for p in params if p.grad is not None]
        before, now = pair.kept, kept_tensors(self._model)
        pair.kept = {place: v for place, v in now.items() if v is not before.get(place)}
        pair.outputs = detached(pair.outputs)
        self.num_captures += 1
        return graph

    @contextmanager
    def _capturing(self, what: str) -> Iterator[Any]:
        """A capture with codes of its own, whose failure names the module that caused it."""
        failure: BaseException | None = None
        try:
            with self._graphs.capture() as graph, self._codes.held():
                try:
                    yield graph
                except BaseException as error:
                    failure = error
                    raise
        except RuntimeError as error:
            self.forget()
            # Ending a broken capture may fail in turn, which says less.
            cause = error if failure is None else failure
            if is_out_of_memory(cause) or not isinstance(cause, RuntimeError):
                raise cause from None
            place = module_in_traceback(cause, self._model) or f"the {what} pass"
            raise RuntimeError(
                f"--cuda-graphs on: {place} cannot be captured ({cause}); use --cuda-graphs off"
            ) from cause


def path_of(modules: Iterable[nn.Module]) -> Hashable:
    """Equal for equal paths of Python through the modules, over tensors at the same addresses.

    Plain values of every module count as they are, objects by identity; lists, sets, dicts and
    tensors are what a forward leaves behind.
    """
    values: list[Hashable] = []
    for module in modules:
        for name, value in vars(module).items():
            if name in BOOKKEEPING:
                continue
            if type(value) in PLAIN:
                values.append(value)
            elif not isinstance(value, LEFT_BEHIND):
                values.append(id(value))
        values += map(id, module._modules.values())
        for tensors in (module._parameters, module._buffers):
            values += [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
    return tuple(values)


def kept_tensors(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Tensors that modules hold beside weights and buffers, by module and attribute."""
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def detached(outputs: Any) -> Any:
    """A SigmaOutput with the same values and no history."""
    aux = {name: value.detach() for name, value in outputs.aux.items()}
    return replace(outputs, hidden=outputs.hidden.detach(), loss=outputs.loss.detach(), aux=aux)


def module_in_traceback(error: BaseException, model: nn.Module) -> str | None:
    """Name and class of the innermost module of the model in which the error came up."""
    names = {id(module): name or "the model" for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    found = [
        f"{names[id(owner)]} ({type(owner).__name__})" for owner in owners if id(owner) in names
    ]
    return found[-1] if found else None
