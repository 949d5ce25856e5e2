"""How a run ends: what failed is reported, and every part of it is closed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

_LOG = logging.getLogger(__name__)


class Closable(Protocol):
    """What a run ends with; an error of `close` does not keep the others open."""

    def close(self) -> object: ...


class ReportedRun(AbstractContextManager["ReportedRun"]):
    """While entered, a run: what fails is reported at once, and at the end all `parts` are closed.

    report: writes the crash report of an error; its path, or None where there is none. It becomes
    the error's `crash_report`, by which the entry tells a failed run from a refused one. `parts`
    are closed in their order, whatever one of them does. That closing fails is a failure of the
    run, too; after another it is only said, so that the first stays the one seen.
    """

    def __init__(
        self, parts: Sequence[Closable], *, report: Callable[[Exception], Path | None]
    ) -> None:
        self._parts, self._report = parts, report

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            with ExitStack() as closing:
                for part in reversed(self._parts):  # the last one in is the first one closed
                    closing.callback(part.close)
                if isinstance(error, Exception):
                    self._mark(error)
        except Exception as problem:
            if error is None:
                self._mark(problem)
                raise
            _LOG.warning("ending the run failed, too: %s: %s", type(problem).__name__, problem)

    def _mark(self, error: Exception) -> None:
        error.crash_report = None  # type: ignore[attr-defined]  # should the report fail itself
        error.crash_report = self._report(error)  # type: ignore[attr-defined]
