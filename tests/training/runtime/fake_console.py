"""The part of Windows' kernel32 that the program calls, as far as a test needs it."""

from __future__ import annotations

import ctypes


class FakeConsole:
    """Windows' answers: `processes` are pid -> image path; `agrees` False refuses requests."""

    def __init__(self, processes: dict[int, str] | None = None, *, agrees: bool = True) -> None:
        self.processes = processes or {}
        self.agrees = agrees
        self.handlers: list = []
        self.states: list[int] = []
        self.open_handles: set[int] = set()
        self.OpenProcess = lambda access, inherit, pid: self._open(pid)  # takes a restype

    def SetConsoleCtrlHandler(self, handler, add: int) -> int:
        if add:
            self.handlers += [handler] if self.agrees else []
        else:
            self.handlers.remove(handler)
        return int(self.agrees)

    def SetThreadExecutionState(self, state: ctypes.c_uint32) -> int:
        self.states.append(state.value)
        return 0x80000000 if self.agrees else 0

    def GetConsoleProcessList(self, pids, size: int) -> int:
        for index, pid in enumerate(list(self.processes)[:size]):
            pids[index] = pid
        return len(self.processes)

    def QueryFullProcessImageNameW(self, handle: ctypes.c_void_p, flags: int, path, size) -> int:
        path.value = self.processes[handle.value or 0]
        return 1

    def CloseHandle(self, handle: ctypes.c_void_p) -> int:
        self.open_handles.remove(handle.value or 0)
        return 1

    def _open(self, pid: int) -> int | None:
        if not self.agrees:
            return None
        self.open_handles.add(pid)
        return pid
