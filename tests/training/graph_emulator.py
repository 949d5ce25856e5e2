"""A CUDA graph on a machine without CUDA: launches recorded with their memory, and repeated.

What makes it a fair stand-in: a replay calls the recorded operations on the recorded tensors and
runs nothing else, so whatever Python decided during the capture stays decided. A capture does no
work: what it wrote outside is put back, random numbers too, and what it made holds NaN until the
first replay. What a capture forbids raises: reading values on the host, shapes that depend on
values, copying numbers of the host to the device. Triton kernels (interpreted) are launches, too.
Memory of the pool that nobody held when a capture began may be given to it: its replays spoil it.

Not emulated: streams, and memory that is given to several tensors within one capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

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


class _Pool:
    """Memory that captures made, under names of the emulator's own."""

    def __init__(self) -> None:
        self.born: dict[int, Tensor] = {}
        self._num_names: Counter[int] = Counter()

    def name(self, values: Any) -> Any:
        """The same memory: writes to it leave the versions of the given tensors alone."""

        def named(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            self._num_names[_storage(value)] += 1
            return value.data

        return tree_map(named, values)

    def unheld(self) -> list[Tensor]:
        """What is kept by nothing but the emulator."""
        return [v for k, v in self.born.items() if _holders(v) == self._num_names[k]]


def _holders(value: Tensor) -> int:
    """Tensors that share the memory; asking is one of the holders."""
    return torch._C._storage_Use_Count(_storage(value)) - 1


def _spoil(value: Tensor) -> None:
    """NaN in every floating type."""
    torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).fill_(255)


class EmulatedGraph:
    """What one capture recorded. overwrites: memory that a replay may find given to it."""

    def __init__(self, overwrites: list[Tensor]) -> None:
        self.overwrites = overwrites
        self.launches: list[Callable[[], None]] = []

    @torch.no_grad()
    def replay(self) -> None:
        for value in self.overwrites:
            _spoil(value)
        for launch in self.launches:
            launch()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph, pool: _Pool) -> None:
        super().__init__()
        self._graph = graph
        self._pool = pool
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
        self._born |= {_storage(value): self._pool.name(value) for value in fresh}
        is_empty = "empty" in name
        if (fresh and not is_empty) or written:
            self._record(func, self._pool.name((args, kwargs)), self._pool.name(result), known)
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
        self._remember(_tensors((args, kwargs)))
        args, kwargs = self._pool.name((args, kwargs))
        run(*args, **kwargs)
        self._graph.launches.append(lambda: run(*args, **kwargs))

    def undo(self) -> None:
        """As if nothing had been done: memory from outside as it was, new memory unset."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for value in self._born.values():
            _spoil(value)
        self._pool.born |= self._born


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


class EmulatedGraphs:
    """The `training.step_graph.Graphs` of no device."""

    def __init__(self) -> None:
        self.renew()

    def warm_up(self) -> Any:
        return nullcontext()

    def renew(self) -> None:
        self._pool = _Pool()

    @contextmanager
    def capture(self) -> Iterator[EmulatedGraph]:
        graph = EmulatedGraph(self._pool.unheld())
        recorder, random = _Recorder(graph, self._pool), torch.get_rng_state()
        try:
            with ExitStack() as stack:
                stack.enter_context(_kernels_recorded(recorder))
                stack.enter_context(_HostReads())
                stack.enter_context(recorder)
                yield graph
        finally:
            recorder.undo()
            torch.set_rng_state(random)


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

    with mock.patch.object(GridExecutor, "__call__", launch):
        yield


def _modes_off() -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
