"""Requests to stop or to save that take effect at the end of a step.

The first Ctrl+C, Ctrl+Break or SIGTERM only sets a flag, so weights, metrics and checkpoint stay in
step with each other; the second ends the process at once, which the checkpoint protocol survives.
Files named STOP and SAVE ask for the same where no signal can be sent. A closed terminal (SIGHUP)
or console window on Windows (`console.py`) asks to stop as well, however often it is said: a
terminal tells its processes twice, by the shell and by the system.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from training.runtime.console import ConsoleClose

EXIT_CODE = 130
STOP_NAME = "STOP"
SAVE_NAME = "SAVE"
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK")
HANGUP = "SIGHUP"

_FIRST = b"\nstopping after this step and saving; once more to exit at once\n"
_CLOSING = b"\nthe window is closing: saving after this step\n"
_SECOND = b"\nexiting at once; the last saved checkpoint is intact\n"


class SignalHandlers:
    """While entered, `receive` handles the signals of these names that this system has.

    In the main thread only: elsewhere Python cannot, and nothing is changed. A hangup that is
    ignored stays so: whoever starts a program by `nohup` wants it to outlive the terminal.
    """

    def __init__(
        self, receive: Callable[[int, FrameType | None], None], *, names: Sequence[str]
    ) -> None:
        self._receive, self._names = receive, names
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> SignalHandlers:
        if threading.current_thread() is threading.main_thread():
            for name in self._names:
                number = getattr(signal, name, None)
                if number is not None and not _is_ignored_hangup(name, number):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()


def _is_ignored_hangup(name: str, number: int) -> bool:
    return name == HANGUP and signal.getsignal(number) is signal.SIG_IGN


class StopRequest:
    """While entered, turns signals and request files into values the loop reads per step.

    Signals are taken over in the main thread only, elsewhere Python cannot; files work anywhere.
    A request file is removed when it is seen, so that the next run does not obey it again; STOP
    also by a run that ends for another reason than a failure (a signal, its last step).
    """

    def __init__(self, output_dir: Path) -> None:
        self._files = {name: _RequestFile(output_dir / name) for name in (STOP_NAME, SAVE_NAME)}
        self._requested = False
        self._signalled = False
        self._handlers = SignalHandlers(self._receive, names=SIGNAL_NAMES)
        self._hangup = SignalHandlers(lambda *_: self._receive_close(), names=(HANGUP,))
        self._close = ConsoleClose(self._receive_close)

    @property
    def requested(self) -> bool:
        """Whether to stop after this step; stays True once it is."""
        if not self._requested and self._files[STOP_NAME].take():
            self._requested = True
        return self._requested

    def take_save_request(self) -> bool:
        """True once per SAVE file."""
        return self._files[SAVE_NAME].take()

    def __enter__(self) -> StopRequest:
        self._handlers.__enter__()
        self._hangup.__enter__()
        if threading.current_thread() is threading.main_thread():
            # After the signals: Windows asks the newest handler first, and the C library's own
            # would take a closing window for Ctrl+Break and not wait.
            self._close.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handlers.__exit__(kind, error, trace)
        self._hangup.__exit__(kind, error, trace)
        self._close.__exit__(kind, error, trace)
        if kind is None:
            self._files[STOP_NAME].take()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            _say(_SECOND)
            os._exit(EXIT_CODE)
        self._signalled = self._requested = True
        _say(_FIRST)

    def _receive_close(self) -> None:
        self._requested = True
        _say(_CLOSING)


class _RequestFile:
    """A file whose appearance is a request, served once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._served_ns: int | None = None

    def take(self) -> bool:
        try:
            written_ns = self._path.stat().st_mtime_ns
        except OSError:
            return False
        if written_ns == self._served_ns:
            return False
        try:
            self._path.unlink()
        except OSError:
            # It cannot be removed, so remember it: one request must not save after every step.
            self._served_ns = written_ns
        return True


def _say(message: bytes) -> None:
    # Unbuffered: print is not safe inside a signal handler that interrupted a print.
    try:
        os.write(2, message)
    except OSError:
        pass
