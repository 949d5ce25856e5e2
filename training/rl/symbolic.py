"""Processes that compare formulas, started when first needed, replaced when they are lost.

A request that takes too long costs its worker its life, and nothing else: the answer is "timeout"
and a new worker takes the next one.
"""

from __future__ import annotations

import json
import multiprocessing
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from training.rl.sandbox_job import TIMEOUT
from training.rl.symbolic_worker import READY, serve

SYMPY = "sympy"
ENGINES = (SYMPY, "math-verify")
START_LIMIT_S = 120.0  # of importing a computer algebra system on a busy machine
ATTEMPTS = 3
LOST = "lost"


@dataclass(slots=True, kw_only=True, frozen=True)
class Comparison:
    """`reason` is passed, wrong, malformed, oversize, timeout or lost."""

    reason: str
    elapsed_s: float


class SymbolicWorker:
    """One process and the pipe to it."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def compare(self, expected: str, actual: str, *, limit_s: float) -> Comparison:
        """Whether `actual` means what `expected` means; RuntimeError if the engine is not there."""
        request = json.dumps([expected, actual]).encode("ascii")
        for _ in range(ATTEMPTS):
            connection = self._connection or self._start()
            begun = time.perf_counter()
            try:
                connection.send_bytes(request)
                if not connection.poll(limit_s):
                    self.close()
                    return Comparison(reason=TIMEOUT, elapsed_s=time.perf_counter() - begun)
                reason = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                self.close()  # killed from outside, or out of memory: another one may do it
                continue
            except BaseException:
                self.close()  # Ctrl+C: the next answer must not be this one's
                raise
            return Comparison(reason=reason, elapsed_s=time.perf_counter() - begun)
        return Comparison(reason=LOST, elapsed_s=0.0)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            # Not its close(): it fails when another thread that starts a process has reaped it.
            process.join()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, self._engine), daemon=True)
        process.start()
        there.close()
        self._process, self._connection = process, here
        try:
            greeting = here.recv_bytes() if here.poll(START_LIMIT_S) else b"it does not start"
        except (EOFError, OSError):
            greeting = b"it ended at once"
        if greeting != READY:
            self.close()
            raise RuntimeError(f"the engine {self._engine}: {greeting.decode('utf-8', 'replace')}")
        return here


class SymbolicPool:
    """Several workers behind one door."""

    def __init__(self, *, num_workers: int, limit_s: float, engine: str = SYMPY) -> None:
        if engine not in ENGINES:
            raise ValueError(f"no engine {engine!r}: there are {', '.join(ENGINES)}")
        self._limit_s = limit_s
        self.workers = [SymbolicWorker(engine) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[SymbolicWorker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)

    def try_engine(self) -> None:
        """Start one worker, whose engine is tried then; RuntimeError if it does not work."""
        worker = self._idle.get()
        try:
            worker.compare("x", "x", limit_s=self._limit_s)
        finally:
            self._idle.put(worker)

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """One comparison for each (expected, actual), in order."""
        if not pairs:
            return []
        with ThreadPoolExecutor(max_workers=len(self.workers)) as threads:
            return list(threads.map(self._compare, pairs))

    def close(self) -> None:
        """End all workers, also one that is computing."""
        for worker in self.workers:
            worker.close()

    def _compare(self, pair: tuple[str, str]) -> Comparison:
        worker = self._idle.get()
        try:
            return worker.compare(*pair, limit_s=self._limit_s)
        finally:
            self._idle.put(worker)
