"""The console window a run lives in, above all on Windows, where it may be the program's own.

A window opened by a double-click belongs to the program and closes with it: after a failure it has
to stay until it was read. Closing it (or logging off) ends the process as soon as the handler of
that event returns, so the handler waits until the run has saved; Windows grants it about 5 seconds,
then the checkpoint before is the newest. Elsewhere all of this is nothing.
Source: Microsoft's console documentation (HandlerRoutine, GetConsoleProcessList).
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

CLOSING_EVENTS = (2, 5, 6)  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
CLOSE_PATIENCE_S = 60.0  # longer than Windows waits; a debugger may make it wait longer
MOST_PROCESSES = 64
QUERY_LIMITED_INFORMATION = 0x1000
PATH_CHARS = 32768
# What may share a double-clicked program's window without being a shell that outlives it.
LAUNCHERS = ("py.exe", "pyw.exe", "python.exe", "pythonw.exe")
POLL_S = 0.05
EXIT_INTERRUPTED = 130
# The calling convention differs on 32-bit Windows only; elsewhere this stands in for tests.
HANDLER = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)(ctypes.c_int, ctypes.c_uint32)


def windows_kernel() -> Any:
    """Windows' kernel32 library; None on other systems."""
    return ctypes.WinDLL("kernel32") if sys.platform == "win32" else None


class ConsoleClose(AbstractContextManager["ConsoleClose"]):
    """While entered, a closing window calls `on_close` and waits for the run to end.

    on_close runs in a thread of Windows' own. `kernel32` stands in for the library in tests.
    """

    def __init__(self, on_close: Callable[[], None], *, kernel32: Any = None) -> None:
        self._on_close = on_close
        self._kernel32 = kernel32 or windows_kernel()
        self._ended = threading.Event()
        self._handler: Any = None

    def __enter__(self) -> ConsoleClose:
        if self._kernel32 is not None:
            handler = HANDLER(self._receive)
            if self._kernel32.SetConsoleCtrlHandler(handler, 1):
                self._handler = handler  # ctypes does not keep it alive, Windows would call nothing
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # First let a waiting handler go: Windows removes none while one of them is running.
        self._ended.set()
        if self._handler is not None:
            self._kernel32.SetConsoleCtrlHandler(self._handler, 0)
            self._handler = None

    def _receive(self, event: int) -> int:
        """Answer an event: 0 = not ours (Ctrl+C, Ctrl+Break are signals), 1 = dealt with."""
        if event not in CLOSING_EVENTS:
            return 0
        self._on_close()
        self._ended.wait(CLOSE_PATIENCE_S)
        return 1


class HeldWindow(AbstractContextManager["HeldWindow"]):
    """Keeps the program's own window open when `exit_code` or an exception tells of a failure.

    In such a window an exception is shown at once and becomes exit code 1; elsewhere it passes.
    """

    def __init__(self, *, kernel32: Any = None) -> None:
        self.exit_code = 0
        self._kernel32 = kernel32 or windows_kernel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if isinstance(error, SystemExit | KeyboardInterrupt):
            return False
        failed = kind is not None or self.exit_code not in (0, EXIT_INTERRUPTED)
        if not failed or not owns_console(self._kernel32) or not is_interactive():
            return False
        if error is not None:
            traceback.print_exception(error)
            self.exit_code = 1
        try:
            input("Press Enter to close this window. ")
        except (EOFError, KeyboardInterrupt, OSError):
            pass
        return True


def owns_console(kernel32: Any) -> bool:
    """Whether the console window was opened for this program and will close with it.

    True when nothing but this process and Python's own launchers is attached to it.
    """
    if kernel32 is None:
        return False
    pids = (ctypes.c_uint32 * MOST_PROCESSES)()
    count = kernel32.GetConsoleProcessList(pids, MOST_PROCESSES)
    if not 1 <= count <= MOST_PROCESSES:  # 0: there is no console
        return False
    if count == 1:
        return True
    # A packed program has no launcher: a Python beside it is a program that started it.
    if getattr(sys, "frozen", False):
        return False
    return all(_image_name(kernel32, pids[index]) in LAUNCHERS for index in range(count))


def is_interactive() -> bool:
    """Whether a person can read what is printed and answer it."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def read_line(seconds: float | None) -> str | None:
    """The line that is typed next, without its end.

    None if nothing was typed for `seconds` (on Windows: no key, elsewhere: no whole line); with
    None there is no limit. EOFError at the end of input.
    """
    if seconds is not None and not _input_within(seconds):
        return None
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _input_within(seconds: float) -> bool:
    if sys.platform == "win32":
        import msvcrt

        deadline = time.monotonic() + seconds
        while not msvcrt.kbhit():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_S)
        return True
    import select

    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _image_name(kernel32: Any, pid: int) -> str:
    """File name of a process's program in lower case; "" when it cannot be asked."""
    kernel32.OpenProcess.restype = ctypes.c_void_p
    handle = kernel32.OpenProcess(QUERY_LIMITED_INFORMATION, 0, pid)
    if not handle:
        return ""
    try:
        path = ctypes.create_unicode_buffer(PATH_CHARS)
        size = ctypes.c_uint32(PATH_CHARS)
        query = kernel32.QueryFullProcessImageNameW
        found = query(ctypes.c_void_p(handle), 0, path, ctypes.byref(size))
        return path.value.replace("\\", "/").rpartition("/")[2].lower() if found else ""
    finally:
        kernel32.CloseHandle(ctypes.c_void_p(handle))
