"""What a disk may hold after the power fails: a model of files whose flushes decide.

Follows Pillai et al. (OSDI 2014) and the crash model of ALICE: file data reaches the medium at
fsync or at any earlier time in any amount, names at fsync of their directory or at any earlier
time in any order; a rename is atomic. A failed fsync drops the data and marks it clean.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.runtime.faults import HookedOps

SECTOR = 16
MODES = ("none", "all", "prefix", "subset")


class RecordingOps(HookedOps):
    """Runs the operations and notes those that change something, in order."""

    def __init__(self) -> None:
        self.trace: list[tuple[Any, ...]] = []

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        # Noted before it runs: what follows needs the model to have it.
        if name in ("fsync", "sync_dir", "make_dir", "remove", "remove_dir"):
            self.trace.append((name, *args))

    def after(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in ("replace", "move_dir"):
            self.trace.append((name, *args))
        elif name == "create":
            self.trace.append((name, args[0], result))
        elif name == "write":
            self.trace.append(("write_data", args[0], bytes(args[1][:result])))


@dataclass(eq=False)
class _File:
    durable: bytes = b""
    cached: bytes = b""

    def after_crash(self, mode: str, rng: random.Random) -> bytes:
        if mode == "none" or self.cached == self.durable:
            return self.durable
        if mode == "all":
            return self.cached
        if rng.random() < 0.5:  # torn: a part arrived
            return self.cached[: rng.randrange(len(self.cached) + 1)]
        grown = bytearray(self.durable[: len(self.cached)].ljust(len(self.cached), b"\0"))
        for start in range(0, len(grown), SECTOR):  # the length arrived, some sectors did not
            if rng.random() < 0.5:
                grown[start : start + SECTOR] = self.cached[start : start + SECTOR]
        return bytes(grown)


@dataclass(eq=False)
class _Dir:
    durable: dict[str, Any] = field(default_factory=dict)
    cached: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Change:
    """A change of names not yet on the medium: (directory, name, node or None to remove)."""

    edits: list[tuple[_Dir, str, Any]]


class Disk:
    """Replays a trace; `after_crash` yields one of the states the medium may be in."""

    def __init__(self, root: Path) -> None:
        self._root_path, self._root = root, _Dir()
        self._open: dict[int, _File] = {}
        self._pending: list[_Change] = []
        self.acknowledged = 0

    def apply(self, event: tuple[Any, ...]) -> None:
        getattr(self, f"_{event[0]}")(*event[1:])

    def after_crash(self, target: Path, mode: str, rng: random.Random) -> None:
        """Write a possible state of the medium into the empty directory `target`."""
        chosen = self._pending
        if mode == "none":
            chosen = []
        elif mode == "prefix":
            chosen = chosen[: rng.randrange(len(chosen) + 1)]
        elif mode == "subset":
            chosen = [change for change in chosen if rng.random() < 0.5]
        names: dict[_Dir, dict[str, Any]] = {}
        for change in chosen:
            self._persist(change, names)
        self._write(self._root, target, names, mode, rng)

    def _persist(self, change: _Change, names: dict[_Dir, dict[str, Any]]) -> None:
        def view(directory: _Dir) -> dict[str, Any]:
            return names.setdefault(directory, dict(directory.durable))

        moved = next((node for _, _, node in change.edits if node is not None), None)
        if len(change.edits) == 2 and moved not in view(change.edits[0][0]).values():
            return  # the name that is renamed never arrived
        for directory, name, node in change.edits:
            if node is None:
                view(directory).pop(name, None)
            else:
                view(directory)[name] = node

    def _write(
        self, node: _Dir, path: Path, names: dict[_Dir, Any], mode: str, rng: random.Random
    ) -> None:
        for name, child in names.get(node, node.durable).items():
            if isinstance(child, _File):
                (path / name).write_bytes(child.after_crash(mode, rng))
            else:
                (path / name).mkdir()
                self._write(child, path / name, names, mode, rng)

    def _find(self, path: Path) -> Any:
        node: Any = self._root
        for name in path.relative_to(self._root_path).parts:
            node = node.cached[name]
        return node

    def _change(self, *edits: tuple[_Dir, str, Any]) -> None:
        for directory, name, node in edits:
            if node is None:
                directory.cached.pop(name, None)
            else:
                directory.cached[name] = node
        self._pending.append(_Change(list(edits)))

    def _make_dir(self, path: Path) -> None:
        if path != self._root_path:
            self._change((self._find(path.parent), path.name, _Dir()))

    def _create(self, path: Path, descriptor: int) -> None:
        parent = self._find(path.parent)
        if path.name in parent.cached:
            parent.cached[path.name].cached = b""
        else:
            self._change((parent, path.name, _File()))
        self._open[descriptor] = parent.cached[path.name]

    def _write_data(self, descriptor: int, data: bytes) -> None:
        self._open[descriptor].cached += data

    def _fsync(self, descriptor: int) -> None:
        self._open[descriptor].durable = self._open[descriptor].cached

    def _lose(self, descriptor: int) -> None:
        """A failed fsync: what is cached reads back, but will never be written."""
        self._open[descriptor].cached = self._open[descriptor].durable

    def _sync_dir(self, path: Path) -> None:
        if path == self._root_path.parent:
            return
        target, left = self._find(path), []
        for change in self._pending:
            if not any(directory is target for directory, _, _ in change.edits):
                left.append(change)
                continue
            for directory, name, node in change.edits:
                if node is None:
                    directory.durable.pop(name, None)
                else:
                    directory.durable[name] = node
        self._pending = left

    def _replace(self, source: Path, target: Path) -> None:
        node, home = self._find(source), self._find(source.parent)
        self._change((home, source.name, None), (self._find(target.parent), target.name, node))

    _move_dir = _replace

    def _remove(self, path: Path) -> None:
        self._change((self._find(path.parent), path.name, None))

    _remove_dir = _remove

    def _ack(self, step: int) -> None:
        self.acknowledged = step

    def _reopen(self, path: Path, descriptor: int) -> None:
        self._open[descriptor] = self._find(path)
