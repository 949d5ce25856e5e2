"""Starting a child on Windows, against a kernel that counts handles and fails at one call."""

import ctypes
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import training.rl.windows_api as windows_api

FALLIBLE = (
    "CreateJobObjectW",
    "SetInformationJobObject",
    "CreatePipe",
    "SetHandleInformation",
    "CreateFileW",
    "InitializeProcThreadAttributeList",
    "UpdateProcThreadAttribute",
    "CreateProcessW",
    "AssignProcessToJobObject",
)
CALLS = 14  # of one start


class Kernel:
    """The calls of kernel32 that `start` makes; the call number `failing` fails."""

    def __init__(self, failing=None):
        self.failing = failing
        self.calls = []
        self.open = set()
        self.ended = False
        self._numbers = itertools.count(100)
        for name in (*FALLIBLE, "CloseHandle", "TerminateProcess", "DeleteProcThreadAttributeList"):
            # A function, not a method: the module sets `restype`, as one does with ctypes.
            setattr(self, name, self._function(name))

    def _function(self, name):
        def call(*arguments):
            is_size_query = name == "InitializeProcThreadAttributeList" and arguments[0] is None
            if name in FALLIBLE and not is_size_query:
                self.calls.append(name)
                if len(self.calls) - 1 == self.failing:
                    return ctypes.c_void_p(-1).value if name == "CreateFileW" else 0
            return getattr(self, f"_{name}", lambda *_: 1)(*arguments)

        return call

    def _handle(self):
        handle = next(self._numbers)
        self.open.add(handle)
        return handle

    def _CreateJobObjectW(self, *_):
        return self._handle()

    def _CreateFileW(self, *_):
        return self._handle()

    def _CreatePipe(self, reading, writing, *_):
        reading._obj.value, writing._obj.value = self._handle(), self._handle()
        return 1

    def _InitializeProcThreadAttributeList(self, buffer, count, flags, size):
        size._obj.value = 64
        return int(buffer is not None)

    def _CreateProcessW(self, *arguments):
        information = arguments[-1]._obj
        information.process, information.thread = self._handle(), self._handle()
        return 1

    def _CloseHandle(self, handle):
        self.open.remove(handle.value)  # KeyError: closed twice, or never opened
        return 1

    def _TerminateProcess(self, *_):
        self.ended = True
        return 1


@pytest.fixture
def api(monkeypatch):
    """start(kernel): one child of `SystemApi` over that kernel32."""

    def start(kernel):
        def to_descriptor(handle, flags):
            kernel.open.remove(handle)  # the file owns it now
            return os.open(os.devnull, os.O_RDWR)

        libraries = {"kernel32": kernel, "advapi32": None, "userenv": None}
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(open_osfhandle=to_descriptor))
        monkeypatch.setattr(
            ctypes, "WinDLL", lambda name, use_last_error: libraries[name], raising=False
        )
        monkeypatch.setattr(ctypes, "get_last_error", lambda: 8, raising=False)
        monkeypatch.setattr(os, "O_BINARY", 0, raising=False)
        spec = importlib.util.spec_from_file_location(
            "windows_api_of_windows", Path(windows_api.__file__)
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.SystemApi().start(
            ["python.exe"], container=b"sid", memory_bytes=1, cpu_s=1, environment={"A": "b"}
        )

    return start


def test_a_child_that_starts_and_is_closed_leaves_no_handle(api):
    kernel = Kernel()
    child = api(kernel)
    assert len(kernel.open) == 3  # job, process, thread: the pipes are files now
    child.close()
    assert not kernel.open
    assert set(kernel.calls) == set(FALLIBLE)
    assert len(kernel.calls) == CALLS


@pytest.mark.parametrize("failing", range(CALLS))
def test_a_call_that_fails_leaves_no_handle_and_no_process(api, failing):
    kernel = Kernel(failing)
    with pytest.raises(OSError):
        api(kernel)
    assert not kernel.open
    assert len(kernel.calls) == failing + 1
    assert kernel.ended == (kernel.calls[-1] == "AssignProcessToJobObject")
