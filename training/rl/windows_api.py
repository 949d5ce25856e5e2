"""The calls of Windows that start a process in an AppContainer and a Job Object, by ctypes.

Everything that has a return value is checked, and a failure is an OSError with the system's words.
Structures after `winnt.h`, `winbase.h` and `processthreadsapi.h`; sizes are tested on any system.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from contextlib import ExitStack
from ctypes import wintypes
from typing import Any, BinaryIO

if sys.platform == "win32":
    import msvcrt

_LOG = logging.getLogger(__name__)

EXTENDED_LIMITS, UI_RESTRICTIONS = 9, 4  # JOBOBJECTINFOCLASS
ALL_UI_RESTRICTIONS = 0xFF
LIMIT_FLAGS = (
    0x2000  # KILL_ON_JOB_CLOSE
    | 0x0400  # DIE_ON_UNHANDLED_EXCEPTION
    | 0x0200  # JOB_MEMORY
    | 0x0100  # PROCESS_MEMORY
    | 0x0008  # ACTIVE_PROCESS
    | 0x0004  # JOB_TIME
    | 0x0002  # PROCESS_TIME
)
CREATE_FLAGS = (
    0x00080000  # EXTENDED_STARTUPINFO_PRESENT
    | 0x08000000  # CREATE_NO_WINDOW
    | 0x00000400  # CREATE_UNICODE_ENVIRONMENT
    | 0x00000004  # CREATE_SUSPENDED
)
ATTRIBUTE_HANDLES = 0x00020002  # PROC_THREAD_ATTRIBUTE_HANDLE_LIST
ATTRIBUTE_CAPABILITIES = 0x00020009  # PROC_THREAD_ATTRIBUTE_SECURITY_CAPABILITIES
ATTRIBUTE_CHILDREN = 0x0002000E  # PROC_THREAD_ATTRIBUTE_CHILD_PROCESS_POLICY
NO_CHILDREN = 1  # PROCESS_CREATION_CHILD_PROCESS_RESTRICTED
USE_STANDARD_HANDLES, HANDLE_INHERIT = 0x00000100, 0x00000001
ALREADY_EXISTS = 0x800700B7 - 2**32  # HRESULT of ERROR_ALREADY_EXISTS
SUCCESSFUL_WAIT = 0
TICKS_PER_S = 10_000_000  # of 100 ns
TERMINATE_WAIT_MS = 10_000


class BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION."""

    _fields_ = [
        ("per_process_time", ctypes.c_int64),
        ("per_job_time", ctypes.c_int64),
        ("limit_flags", ctypes.c_uint32),
        ("minimum_working_set", ctypes.c_size_t),
        ("maximum_working_set", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority_class", ctypes.c_uint32),
        ("scheduling_class", ctypes.c_uint32),
    ]


class ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = [
        ("basic", BasicLimits),
        ("io_counters", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    ]


class SecurityAttributes(ctypes.Structure):
    """SECURITY_ATTRIBUTES."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("descriptor", ctypes.c_void_p),
        ("inherit", ctypes.c_int32),
    ]


class SecurityCapabilities(ctypes.Structure):
    """SECURITY_CAPABILITIES: the container, with no capability at all."""

    _fields_ = [
        ("container", ctypes.c_void_p),
        ("capabilities", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class StartupInfo(ctypes.Structure):
    """STARTUPINFOEXW."""

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_void_p),
        ("desktop", ctypes.c_void_p),
        ("title", ctypes.c_void_p),
        ("geometry", ctypes.c_uint32 * 7),
        ("flags", ctypes.c_uint32),
        ("show_window", ctypes.c_uint16),
        ("reserved_size", ctypes.c_uint16),
        ("reserved_bytes", ctypes.c_void_p),
        ("standard_input", ctypes.c_void_p),
        ("standard_output", ctypes.c_void_p),
        ("standard_error", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
    ]


class ProcessInformation(ctypes.Structure):
    """PROCESS_INFORMATION."""

    _fields_ = [
        ("process", ctypes.c_void_p),
        ("thread", ctypes.c_void_p),
        ("process_id", ctypes.c_uint32),
        ("thread_id", ctypes.c_uint32),
    ]


def job_limits(*, memory_bytes: int, cpu_s: int) -> ExtendedLimits:
    """The limits of a job for one process that dies with its job."""
    limits = ExtendedLimits()
    limits.basic.limit_flags = LIMIT_FLAGS
    limits.basic.active_processes = 1
    limits.basic.per_process_time = limits.basic.per_job_time = cpu_s * TICKS_PER_S
    limits.process_memory = limits.job_memory = memory_bytes
    return limits


def environment_block(environment: dict[str, str]) -> str:
    """CreateProcess' form of an environment: sorted, each ended by a zero, one more at the end."""
    entries = sorted(environment.items(), key=lambda entry: entry[0].upper())
    return "".join(f"{name}={value}\0" for name, value in entries) + "\0"


def grant_reading(path: str, identifier: str) -> None:
    """Let a container read a file, or a folder with all in it; logged where it cannot be granted.

    That need not be the end: `Program Files`, where a Python for all users lies, is not ours to
    change and open to all containers as it is. Whether the child can read is tried afterwards.
    """
    rights = "(OI)(CI)(RX)" if os.path.isdir(path) else "(RX)"
    icacls = os.path.join(os.environ["SYSTEMROOT"], "System32", "icacls.exe")
    command = [icacls, path, "/grant", f"*{identifier}:{rights}", "/Q"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    else:
        if run.returncode == 0:
            return
        reason = run.stderr.strip()
    _LOG.warning("reading of %s could not be granted to the sandbox: %s", path, reason)


if sys.platform == "win32":
    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
    _userenv = ctypes.WinDLL("userenv", use_last_error=True)
    for _name in ("CreateJobObjectW", "CreateFileW"):
        getattr(_kernel32, _name).restype = wintypes.HANDLE

    def _checked(result: Any, name: str) -> Any:
        """`result`, unless it means failure: then OSError."""
        if not result or result == wintypes.HANDLE(-1).value:
            raise OSError(None, name, None, ctypes.get_last_error())
        return result

    class _Attributes:
        """The attribute list of a process to be created; keeps alive what it points to."""

        def __init__(self, values: dict[int, Any]) -> None:
            self._kept = values
            size = ctypes.c_size_t()
            count = len(values)
            _kernel32.InitializeProcThreadAttributeList(None, count, 0, ctypes.byref(size))
            self.buffer = ctypes.create_string_buffer(size.value)
            _checked(
                _kernel32.InitializeProcThreadAttributeList(
                    self.buffer, count, 0, ctypes.byref(size)
                ),
                "InitializeProcThreadAttributeList",
            )
            for key, value in values.items():
                _checked(
                    _kernel32.UpdateProcThreadAttribute(
                        self.buffer,
                        0,
                        ctypes.c_size_t(key),
                        ctypes.byref(value),
                        ctypes.c_size_t(ctypes.sizeof(value)),
                        None,
                        None,
                    ),
                    "UpdateProcThreadAttribute",
                )

        def close(self) -> None:
            _kernel32.DeleteProcThreadAttributeList(self.buffer)

    def _create_job(*, memory_bytes: int, cpu_s: int) -> wintypes.HANDLE:
        job = wintypes.HANDLE(_checked(_kernel32.CreateJobObjectW(None, None), "CreateJobObject"))
        limits = job_limits(memory_bytes=memory_bytes, cpu_s=cpu_s)
        restrictions = wintypes.DWORD(ALL_UI_RESTRICTIONS)
        for kind, value in ((EXTENDED_LIMITS, limits), (UI_RESTRICTIONS, restrictions)):
            done = _kernel32.SetInformationJobObject(
                job, kind, ctypes.byref(value), ctypes.sizeof(value)
            )
            if not done:
                error = ctypes.get_last_error()
                _kernel32.CloseHandle(job)
                raise OSError(None, "SetInformationJobObject", None, error)
        return job

    def _create_pipe(
        childs: ExitStack, ours: ExitStack, *, child_reads: bool
    ) -> tuple[wintypes.HANDLE, wintypes.HANDLE]:
        """The child's end, which it inherits, and ours, which it does not; the stacks own them."""
        attributes = SecurityAttributes(ctypes.sizeof(SecurityAttributes), None, True)
        reading, writing = wintypes.HANDLE(), wintypes.HANDLE()
        _checked(
            _kernel32.CreatePipe(
                ctypes.byref(reading), ctypes.byref(writing), ctypes.byref(attributes), 0
            ),
            "CreatePipe",
        )
        child, our = (reading, writing) if child_reads else (writing, reading)
        childs.callback(_kernel32.CloseHandle, child)
        ours.callback(_kernel32.CloseHandle, our)
        _checked(_kernel32.SetHandleInformation(our, HANDLE_INHERIT, 0), "SetHandleInformation")
        return child, our

    def _open_nowhere() -> wintypes.HANDLE:
        attributes = SecurityAttributes(ctypes.sizeof(SecurityAttributes), None, True)
        handle = _kernel32.CreateFileW(
            "NUL", 0x40000000, 3, ctypes.byref(attributes), 3, 0, None
        )  # GENERIC_WRITE, shared, OPEN_EXISTING
        return wintypes.HANDLE(_checked(handle, "CreateFile"))

    class SystemChild:
        """One process in its job, with two pipes as files."""

        def __init__(
            self,
            job: wintypes.HANDLE,
            information: ProcessInformation,
            to_child: BinaryIO,
            from_child: BinaryIO,
        ) -> None:
            self._job, self._information = job, information
            self.to_child, self.from_child = to_child, from_child

        def resume(self) -> None:
            if _kernel32.ResumeThread(wintypes.HANDLE(self._information.thread)) == 0xFFFFFFFF:
                raise OSError(None, "ResumeThread", None, ctypes.get_last_error())

        def terminate(self) -> None:
            _checked(_kernel32.TerminateJobObject(self._job, 1), "TerminateJobObject")
            process = wintypes.HANDLE(self._information.process)
            waited = _kernel32.WaitForSingleObject(process, TERMINATE_WAIT_MS)
            if waited != SUCCESSFUL_WAIT:
                raise OSError("the process is still there after its job was ended")

        def close(self) -> None:
            self.from_child.close()
            try:
                self.to_child.close()
            except OSError:
                pass  # what was not yet written to a dead child
            for handle in (self._information.thread, self._information.process):
                _kernel32.CloseHandle(wintypes.HANDLE(handle))
            _kernel32.CloseHandle(self._job)

    class SystemApi:
        """`WindowsApi` of the real system."""

        def prepare_container(self, name: str, readable: list[str]) -> bytes:
            sid = ctypes.c_void_p()
            result = _userenv.CreateAppContainerProfile(
                name, name, "Untrusted programs of SIGMA", None, 0, ctypes.byref(sid)
            )
            if result == ALREADY_EXISTS:
                result = _userenv.DeriveAppContainerSidFromAppContainerName(name, ctypes.byref(sid))
            if result != 0:
                raise OSError(
                    f"the AppContainer {name} cannot be made: HRESULT {result & 0xFFFFFFFF:#x}"
                )
            try:
                data = ctypes.string_at(sid, _advapi32.GetLengthSid(sid))
                text = ctypes.c_wchar_p()
                done = _advapi32.ConvertSidToStringSidW(sid, ctypes.byref(text))
                _checked(done, "ConvertSidToStringSid")
                identifier = text.value
                _kernel32.LocalFree(text)
            finally:
                _advapi32.FreeSid(sid)
            for path in readable:
                grant_reading(path, identifier or "")
            return data

        def start(
            self,
            command: list[str],
            *,
            container: bytes,
            memory_bytes: int,
            cpu_s: int,
            environment: dict[str, str],
        ) -> SystemChild:
            with ExitStack() as childs, ExitStack() as ours:
                job = _create_job(memory_bytes=memory_bytes, cpu_s=cpu_s)
                ours.callback(_kernel32.CloseHandle, job)
                child_in, our_in = _create_pipe(childs, ours, child_reads=True)
                child_out, our_out = _create_pipe(childs, ours, child_reads=False)
                nowhere = _open_nowhere()
                childs.callback(_kernel32.CloseHandle, nowhere)
                inherited = (wintypes.HANDLE * 3)(child_in, child_out, nowhere)
                information = _create_suspended(command, inherited, container, environment)
                process = wintypes.HANDLE(information.process)
                ours.callback(_kernel32.CloseHandle, wintypes.HANDLE(information.thread))
                ours.callback(_kernel32.CloseHandle, process)
                if not _kernel32.AssignProcessToJobObject(job, process):
                    error = ctypes.get_last_error()
                    _kernel32.TerminateProcess(process, 1)
                    raise OSError(None, "AssignProcessToJobObject", None, error)
                ours.pop_all()
            to_child = os.fdopen(msvcrt.open_osfhandle(our_in.value or 0, os.O_BINARY), "wb", 0)
            from_child = os.fdopen(msvcrt.open_osfhandle(our_out.value or 0, os.O_BINARY), "rb", 0)
            return SystemChild(job, information, to_child, from_child)

    def _create_suspended(
        command: list[str], inherited: Any, container: bytes, environment: dict[str, str]
    ) -> ProcessInformation:
        sid = ctypes.create_string_buffer(container, len(container))
        capabilities = SecurityCapabilities(ctypes.addressof(sid), None, 0, 0)
        policy = wintypes.DWORD(NO_CHILDREN)
        attributes = _Attributes(
            {
                ATTRIBUTE_HANDLES: inherited,
                ATTRIBUTE_CAPABILITIES: capabilities,
                ATTRIBUTE_CHILDREN: policy,
            }
        )
        startup, information = StartupInfo(), ProcessInformation()
        startup.size, startup.flags = ctypes.sizeof(startup), USE_STANDARD_HANDLES
        startup.standard_input, startup.standard_output, startup.standard_error = inherited
        startup.attributes = ctypes.addressof(attributes.buffer)
        block = ctypes.create_unicode_buffer(environment_block(environment))
        line = ctypes.create_unicode_buffer(subprocess.list2cmdline(command))
        try:
            _checked(
                _kernel32.CreateProcessW(
                    command[0],
                    line,
                    None,
                    None,
                    True,
                    CREATE_FLAGS,
                    block,
                    None,
                    ctypes.byref(startup),
                    ctypes.byref(information),
                ),
                "CreateProcess",
            )
        finally:
            attributes.close()
        return information
