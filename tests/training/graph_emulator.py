"""A CUDA graph on a machine without CUDA: launches recorded with their memory, and repeated.

What makes it a fair stand-in: a replay calls the recorded operations on the recorded tensors and
runs nothing else, so whatever Python decided during the capture stays decided. A capture does no
work: what it wrote outside is put back, random numbers too, and what it made holds NaN until the
first replay. What a capture forbids raises: reading values on the host, shapes that depend on
values, copying numbers of the host to the device. Triton kernels (interpreted) are launches, too.

Not emulated: streams, and memory that a pool gives to several tensors in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ASKED_OF_A_HOST = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__",
    "__array__", "__contains__", "tensor", "as_tensor", "from_numpy", "get_rng_state",
}  # fmt: skip
NEEDS_VALUES = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave", "aten::equal", "aten::lift_fresh",
}  # fmt: skip


class CaptureError(RuntimeError):
    def __init__(self, what: str) -> None:
        super().__init__(f"operation not permitted when stream is capturing: {what}")


class _HostReads(TorchFunctionMode):
    """Raises where Python asks for values; some such reads on a CPU are no operation at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        uploads = name in ("tensor", "as_tensor") and isinstance(args[0], Tensor)
        if name in ASKED_OF_A_HOST and not uploads:
            raise CaptureError(name)
        return func(*args, **(kwargs or {}))


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _same_memory(values: Any) -> Any:
    """The tensors' memory under another name: writes to it leave the version of the first alone."""
    return tree_map(lambda v: v.data if isinstance(v, Tensor) else v, values)


class EmulatedGraph:
    """What one capture recorded."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []
        self.num_replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.num_replays += 1
        for launch in self.launches:
            launch()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self._graph = graph
        self._born: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        reads_mask = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            mask.dtype == torch.bool for mask in _tensors(args[1])
        )
        if name in NEEDS_VALUES or reads_mask:
            raise CaptureError(name)
        written = _written(func, args, kwargs)
        self._remember(written)
        result = func(*args, **kwargs)
        known = {_storage(value) for value in _tensors((args, kwargs))}
        fresh = [v for v in _tensors(result) if _storage(v) not in known]
        self._born |= {_storage(value): value.data for value in fresh}
        is_empty = "empty" in name
        if (fresh and not is_empty) or written:
            self._record(func, _same_memory((args, kwargs)), _same_memory(result), known)
        return result

    def _remember(self, written: list[Tensor]) -> None:
        """What stood in memory from outside, before the capture's own execution writes to it."""
        for value in written:
            key = _storage(value)
            if key not in self._born and key not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
                self._before[key] = (whole, whole.clone())

    def _record(self, func: Any, given: Any, result: Any, known: set[int]) -> None:
        args, kwargs = given

        def launch() -> None:
            again = func(*args, **kwargs)
            for place, value in zip(_tensors(result), _tensors(again), strict=True):
                if _storage(place) not in known:
                    place.copy_(value)

        self._graph.launches.append(launch)

    def record_kernel(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """A Triton kernel; it may write to any of its arguments."""
        args, kwargs = _same_memory((args, kwargs))
        self._remember(_tensors((args, kwargs)))
        run(*args, **kwargs)
        self._graph.launches.append(lambda: run(*args, **kwargs))

    def undo(self) -> None:
        """As if nothing had been done: memory from outside as it was, new memory unset."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for value in self._born.values():
            torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).fill_(255)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


class EmulatedGraphs:
    """The part of `training.step_graph.Graphs`; counts what it was asked for."""

    def __init__(self) -> None:
        self.graphs: list[EmulatedGraph] = []
        self.num_renewals = 0

    def warm_up(self) -> Any:
        return nullcontext()

    def renew(self) -> None:
        self.num_renewals += 1

    @contextmanager
    def capture(self) -> Iterator[EmulatedGraph]:
        graph = EmulatedGraph()
        recorder, random = _Recorder(graph), torch.get_rng_state()
        try:
            with ExitStack() as stack:
                stack.enter_context(_kernels_recorded(recorder))
                stack.enter_context(_HostReads())
                stack.enter_context(recorder)
                yield graph
        finally:
            recorder.undo()
            torch.set_rng_state(random)
        self.graphs.append(graph)


@contextmanager
def _kernels_recorded(recorder: _Recorder) -> Iterator[None]:
    """Interpreted kernels go to the recorder; what the interpreter does itself is no launch."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction(), _modes_off():
            recorder.record_kernel(lambda *a, **k: run(executor, *a, **k), args, kwargs)

    GridExecutor.__call__ = launch
    try:
        yield
    finally:
        GridExecutor.__call__ = run


def _modes_off() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
