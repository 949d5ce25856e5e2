"""The list of system calls that an untrusted program may make, as a program for the kernel.

A list of what is allowed, not of what is forbidden: a call that the next kernel adds is refused
without anybody having thought of it. No call on the list makes a process, a thread, a socket or a
shared object, sends a signal, or looks at another process, so one program is always one thread of
one process, and killing it kills all of it. After `userspace-api/seccomp_filter` of the kernel
documentation; numbers from its `asm/unistd` tables of x86-64 and arm64.
"""

from __future__ import annotations

import errno
import struct

# Classic BPF: load a word of `struct seccomp_data`, jump, return.
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32_BIT = 0x40000000

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Name: (number on x86-64, number on arm64); None where the architecture has no such call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # descriptors
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # files: which of them, Landlock and the mount namespace decide
    "open": (2, None),
    "openat": (257, 56),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "umask": (95, 166),
    # time
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    # what every thread of every program does
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "sched_yield": (24, 124),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# fcntl by command, prlimit64 for asking about oneself only; some callers want another refusal.
_FCNTL, _PRLIMIT = (72, 25), (302, 261)
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_REFUSED_SOFTLY = (((16, 29), errno.ENOTTY), ((435, 435), errno.ENOSYS))  # ioctl, clone3
CAPSET = {"x86_64": 126, "aarch64": 91}


def _instruction(code: int, value: int, *, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, true, false, value)


def _return(value: int) -> bytes:
    return _instruction(_RETURN, value)


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """`body` for this call number; it must end in a return."""
    return [_instruction(_EQUAL, number, false=len(body)), *body]


def _fcntl_rule() -> list[bytes]:
    """Allow the commands that only copy or describe a descriptor: no owner, signal or lease."""
    body = [_instruction(_LOAD, _ARGUMENTS + 8)]
    for command in _FCNTL_COMMANDS:
        body += [_instruction(_EQUAL, command, false=1), _return(_ALLOW)]
    return [*body, _return(_FAIL | errno.EPERM)]


def _prlimit_rule() -> list[bytes]:
    """Allow reading the caller's own limits: process 0 and no new value."""
    zeros = (_ARGUMENTS, _ARGUMENTS + 16, _ARGUMENTS + 20)
    body: list[bytes] = []
    for place in zeros:
        body += [
            _instruction(_LOAD, place),
            _instruction(_EQUAL, 0, true=1),
            _return(_FAIL | errno.EPERM),
        ]
    return [*body, _return(_ALLOW)]


def seccomp_filter(machine: str) -> bytes:
    """The filter for `platform.machine()`, 8 bytes an instruction; ValueError if it has none.

    A call of another architecture (32-bit, x32) kills the process, any other call that is not on
    the list fails with EPERM.
    """
    if machine not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ValueError(f"no list of system calls for {machine}, only for {known}")
    column = list(ARCHITECTURES).index(machine)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, ARCHITECTURES[machine], true=1),
        _return(_KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32_BIT, false=1),
        _return(_KILL_PROCESS),
    ]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += _when(number, [_return(_ALLOW)])
    program += _when(_FCNTL[column], _fcntl_rule())
    program += _when(_PRLIMIT[column], _prlimit_rule())
    for numbers, code in _REFUSED_SOFTLY:
        program += _when(numbers[column], [_return(_FAIL | code)])
    program.append(_return(_FAIL | errno.EPERM))
    return b"".join(program)
