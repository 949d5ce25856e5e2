"""Keeps Windows from suspending the machine while a run lasts; the screen may go dark.

A run of days sits idle in Windows' eyes, for nobody types. The request belongs to the thread that
makes it and ends with it, so a killed run leaves nothing behind. Elsewhere it does nothing.
Source: Microsoft's documentation of SetThreadExecutionState.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from training.runtime.console import windows_kernel

CONTINUOUS = 0x80000000  # ES_CONTINUOUS: until it is said otherwise
SYSTEM_REQUIRED = 0x00000001  # ES_SYSTEM_REQUIRED: the system, not the display
ADVICE = "it would not be kept awake; see its energy settings"


class KeepAwake(AbstractContextManager["KeepAwake"]):
    """While entered, by one thread, the machine does not fall asleep of itself.

    held: whether Windows has agreed; False on other systems. `kernel32` stands in for the library
    in tests.
    """

    def __init__(self, *, kernel32: Any = None) -> None:
        self.held = False
        self._kernel32 = kernel32 or windows_kernel()

    def __enter__(self) -> KeepAwake:
        self.held = self._request(CONTINUOUS | SYSTEM_REQUIRED)
        if self._kernel32 is not None and not self.held:
            print("Windows may suspend this machine while it trains: " + ADVICE, file=sys.stderr)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.held:
            self._request(CONTINUOUS)
            self.held = False

    def _request(self, state: int) -> bool:
        if self._kernel32 is None:
            return False
        # It answers with the state before, and 0 where it refuses.
        return self._kernel32.SetThreadExecutionState(ctypes.c_uint32(state)) != 0
