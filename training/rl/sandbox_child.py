"""The program that runs one untrusted program: locks itself in, calls it, returns plain data.

It stands alone, imports nothing of ours and is started afresh for every program, so that there is
nothing in its memory worth reading: no expected value, no test, no secret. Whatever it sends is
only data to the parent, which compares and decides. The locks are taken
before the first foreign byte is compiled; if one fails nothing is run. After Landlock (Salaun,
kernel documentation `userspace-api/landlock`) and seccomp (`userspace-api/seccomp_filter`).

In: one JSON object on standard input. Out, on what was standard output: a line that names the
locks, then one line for each call. The encoding of values (`encode`, `decode`) is the parent's too.
"""

import json
import os
import sys

MAX_DEPTH = 40

# (first ABI version, access bit) of the file rights that Landlock can take away, by meaning.
_READ_RIGHTS = ((1, 2), (1, 3))  # READ_FILE, READ_DIR
_EXECUTE_RIGHT = (1, 0)
_WRITE_RIGHTS = ((1, 1), (1, 4), (1, 5), (1, 7), (1, 8), (3, 14))
_OTHER_RIGHTS = ((1, 6), (1, 9), (1, 10), (1, 11), (1, 12), (2, 13), (5, 15))
_FILE_ONLY = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14


def encode(value, depth=0):
    """`value` as JSON data that keeps exact types; TypeError for anything but plain values."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise TypeError("nested too deeply")
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return {"i": hex(value)}
    if kind is float:
        return {"f": value.hex()}
    if kind is complex:
        return {"c": [value.real.hex(), value.imag.hex()]}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind is dict:
        pairs = [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]
        return {"d": pairs}
    for tag, sequence in (("t", tuple), ("s", set), ("z", frozenset)):
        if kind is sequence:
            return {tag: [encode(item, depth + 1) for item in value]}
    raise TypeError("not a plain value: " + kind.__name__)


def decode(data, depth=0):
    """The value that `encode` made `data` of; ValueError for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if data is None or type(data) is bool or type(data) is str:
        return data
    if type(data) is list:
        return [decode(item, depth + 1) for item in data]
    if type(data) is not dict or len(data) != 1:
        raise ValueError("not an encoded value")
    ((tag, body),) = data.items()
    if type(body) is str:
        if tag == "i" and body.lstrip("-").startswith("0x"):
            return int(body, 16)
        if tag == "f":
            return float.fromhex(body)
        if tag == "b":
            return bytes.fromhex(body)
    elif type(body) is list:
        if tag == "c" and len(body) == 2 and all(type(part) is str for part in body):
            return complex(float.fromhex(body[0]), float.fromhex(body[1]))
        return _decode_container(tag, body, depth)
    raise ValueError("not an encoded value")


def _decode_container(tag, body, depth):
    try:
        if tag == "d" and all(type(pair) is list and len(pair) == 2 for pair in body):
            return {decode(key, depth + 1): decode(item, depth + 1) for key, item in body}
        for name, sequence in (("t", tuple), ("s", set), ("z", frozenset)):
            if tag == name:
                return sequence(decode(item, depth + 1) for item in body)
    except TypeError:
        raise ValueError("an element cannot be hashed") from None
    raise ValueError("not an encoded value")


class _Kernel:
    """System calls that Python has no name for; OSError with the call's name when one fails."""

    def __init__(self):
        import ctypes

        self.ctypes = ctypes
        self.libc = ctypes.CDLL(None, use_errno=True)

    def call(self, name, number, *arguments):
        words = [self.ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
        result = self.libc.syscall(self.ctypes.c_long(number), *words)
        if result < 0:
            number = self.ctypes.get_errno()
            raise OSError(number, name + ": " + os.strerror(number))
        return result

    def prctl(self, name, option, *arguments):
        words = [self.ctypes.c_ulong(item) for item in (*arguments, 0, 0, 0, 0)[:4]]
        if self.libc.prctl(option, *words) != 0:
            number = self.ctypes.get_errno()
            raise OSError(number, name + ": " + os.strerror(number))


def set_limits(limits):
    """Set resource limits, hard and soft alike; `limits` maps names of `resource` to numbers."""
    import resource

    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def drop_capabilities(kernel, number):
    """Give up every capability, so that even a program of root passes no permission check."""
    header = kernel.ctypes.create_string_buffer(
        (0x20080522).to_bytes(4, "little") + bytes(4), 8
    )  # _LINUX_CAPABILITY_VERSION_3, this process
    kernel.call("capset", number, header, kernel.ctypes.create_string_buffer(24))


def restrict_files(kernel, readable, writable):
    """Landlock: files beneath `readable` may be read, beneath `writable` changed; its version."""
    abi = kernel.call("landlock_create_ruleset", 444, None, 0, 1)
    rights = (_EXECUTE_RIGHT, *_READ_RIGHTS, *_WRITE_RIGHTS, *_OTHER_RIGHTS)
    handled = sum(1 << bit for since, bit in rights if abi >= since)
    network = 3 if abi >= 4 else 0  # bind and connect of TCP
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals
    words = [handled, network, scoped][: 1 if abi < 4 else 2 if abi < 6 else 3]
    attributes = b"".join(word.to_bytes(8, "little") for word in words)
    ruleset = kernel.call(
        "landlock_create_ruleset",
        444,
        kernel.ctypes.create_string_buffer(attributes, len(attributes)),
        len(attributes),
        0,
    )
    reading = sum(1 << bit for _, bit in _READ_RIGHTS) | 1 << _EXECUTE_RIGHT[1]
    writing = sum(1 << bit for since, bit in (*_READ_RIGHTS, *_WRITE_RIGHTS) if abi >= since)
    for paths, allowed in ((readable, reading), (writable, writing)):
        for path in paths:
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # not every system has each library directory
            allowed_here = allowed if os.path.isdir(path) else allowed & _FILE_ONLY & handled
            rule = allowed_here.to_bytes(8, "little") + place.to_bytes(4, "little")
            buffer = kernel.ctypes.create_string_buffer(rule, 12)
            kernel.call("landlock_add_rule", 445, ruleset, 1, buffer, 0)
            os.close(place)
    kernel.call("landlock_restrict_self", 446, ruleset, 0)
    os.close(ruleset)
    return abi


def restrict_calls(kernel, program):
    """seccomp: from here on the kernel runs only the calls that the filter `program` lets pass."""
    ctypes = kernel.ctypes
    code = ctypes.create_string_buffer(program, len(program))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    header = Filter(len(program) // 8, ctypes.addressof(code))
    kernel.prctl("seccomp", 22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, MODE_FILTER


def lock_linux(lock):
    """Take every lock that `lock` asks for, in the order in which each still can be; their names.

    OSError when a required one cannot be had. Landlock may be missing only where a mount
    namespace already hides the files (`landlock_required` false).
    """
    kernel, taken = _Kernel(), []
    kernel.prctl("death signal", 1, 9)  # SIGKILL when whoever started us dies
    kernel.prctl("no_new_privs", 38, 1)
    set_limits(lock["limits"])
    taken.append("rlimits")
    drop_capabilities(kernel, lock["capset"])
    taken.append("capabilities")
    try:
        abi = restrict_files(kernel, lock["readable"], lock["writable"])
        taken.append("landlock " + str(abi))
    except OSError:
        if lock["landlock_required"]:
            raise
    restrict_calls(kernel, bytes.fromhex(lock["seccomp"]))
    taken.append("seccomp")
    return taken


def send(reply, message):
    """One JSON line, over short writes."""
    rest = (json.dumps(message) + "\n").encode("ascii")
    while rest:
        rest = rest[os.write(reply, rest) :]


def call_once(function, arguments):
    """The message about one call; the program may raise anything, SystemExit included."""
    try:
        return {"value": encode(function(*map(decode, arguments)))}
    except BaseException as error:
        return {"error": type(error).__name__[:80]}


def run_program(job, reply):
    """Define the program's names, then call its function once for each list of arguments."""
    names = {"__name__": "__candidate__", "__builtins__": __builtins__}
    try:
        exec(compile(job["program"], "<candidate>", "exec"), names)  # the purpose of this process
        function = names[job["function"]]
    except BaseException as error:
        send(reply, {"error": type(error).__name__[:80]})
        return
    for arguments in job["cases"]:
        send(reply, call_once(function, arguments))


def main():
    """Read the job, lock, run; the exit code says nothing and nobody reads it."""
    with os.fdopen(os.dup(0), "rb") as stream:
        job = json.loads(stream.read())
    reply, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        # Everything else that was left open here by whoever started us is closed, unread.
        os.closerange(3, reply)
        os.closerange(reply + 1, 1024)
        taken = lock_linux(job.pop("lock")) if sys.platform == "linux" else []
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        send(reply, {"refused": str(error)})
        return
    send(reply, {"locked": taken})
    run_program(job, reply)


if __name__ == "__main__":
    main()
