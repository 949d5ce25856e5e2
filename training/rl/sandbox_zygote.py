"""Starts, watches and buries one untrusted program after another, for a parent it knows nothing of.

It stands between the trainer and the programs: a small process that never held weights, tokens or
a device, so nothing of those can be inherited; and, as the subreaper of all it starts, the one who
knows when really nothing is left of a program: it answers only after waiting found no child. It
imports nothing of ours and runs one program at a time. Linux only.

Started as `python -I -S -B sandbox_zygote.py COMMAND...`. In: a head (limit in seconds as double,
number of bytes) and the job; out: a head (outcome, seconds, number of bytes) and the reply. The
end of its input is the end of its parent: the program dies with it.
"""

import os
import select
import signal
import struct
import sys
import time

REQUEST = struct.Struct("<dQ")
ANSWER = struct.Struct("<BdQ")
ENDED, TIMEOUT, OVERSIZE = 0, 1, 2
REPLY_LIMIT_BYTES = 2**20
_CHUNK = 2**16


def read_exactly(descriptor, size):
    """`size` bytes; EOFError when the other side is gone."""
    parts = []
    while size:
        part = os.read(descriptor, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(descriptor, data):
    """All of the bytes, in as many writes as that takes; OSError when the other end is gone."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def become_subreaper():
    """Orphans of a program become ours (prctl PR_SET_CHILD_SUBREAPER); OSError if they cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(36, ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def start(command):
    """Process number, pipe to write the job to, pipe to read the reply from; none of them waits."""
    job_read, job_write = os.pipe()
    reply_read, reply_write = os.pipe()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    actions = [
        (os.POSIX_SPAWN_DUP2, job_read, 0),
        (os.POSIX_SPAWN_DUP2, reply_write, 1),
        (os.POSIX_SPAWN_DUP2, nowhere, 2),
    ]
    usual = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)  # which we ignore, and it shall not
    try:
        process = os.posix_spawn(
            command[0], command, {}, file_actions=actions, setpgroup=0, setsigdef=usual
        )
    except OSError:
        os.close(job_write)
        os.close(reply_read)
        raise
    finally:
        for descriptor in (job_read, reply_write, nowhere):
            os.close(descriptor)
    os.set_blocking(job_write, False)
    os.set_blocking(reply_read, False)
    return process, open(job_write, "wb", buffering=0), open(reply_read, "rb", buffering=0)


def bury(process):
    """Kill the program and all it started; returns when none of them is left, not even a zombie."""
    for kill, target in ((os.killpg, process), (os.kill, process)):
        try:
            kill(target, signal.SIGKILL)
        except ProcessLookupError:
            pass
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return
        # What the dead one left behind is ours now: it is not spared either.
        for orphan in children():
            try:
                os.kill(orphan, signal.SIGKILL)
            except ProcessLookupError:
                pass


def children():
    """Numbers of our present children, where the kernel tells; waiting finds them in any case."""
    try:
        with open("/proc/thread-self/children", encoding="ascii") as listing:
            return [int(word) for word in listing.read().split()]
    except OSError:
        return []


def exchange(job, to_child, from_child, deadline):
    """Outcome and reply: hand the job over and collect until the end, the limit or the cap."""
    rest, reply = memoryview(job), bytearray()
    poll = select.poll()
    poll.register(0, select.POLLHUP)
    poll.register(from_child, select.POLLIN)
    poll.register(to_child, select.POLLOUT)
    writing, reading = to_child.fileno(), from_child.fileno()
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return TIMEOUT, reply
        ready = dict(poll.poll(remaining * 1000 + 1))
        if 0 in ready:
            raise EOFError
        if writing in ready:
            try:
                rest = rest[to_child.write(rest[:_CHUNK]) or 0 :]
            except BrokenPipeError:
                rest = rest[:0]
            if not rest:
                poll.unregister(writing)
                to_child.close()
        if reading in ready:
            part = from_child.read(_CHUNK)
            if part == b"":
                return ENDED, reply
            reply += part or b""
            if len(reply) > REPLY_LIMIT_BYTES:
                return OVERSIZE, reply[:REPLY_LIMIT_BYTES]


def serve_one(command, limit_s, job):
    """Run one job; its outcome, the seconds until nothing was left of it, and the reply."""
    begun = time.monotonic()
    process, to_child, from_child = start(command)
    with to_child, from_child:
        try:
            outcome, reply = exchange(job, to_child, from_child, begun + limit_s)
        finally:
            bury(process)
    return outcome, time.monotonic() - begun, reply


def main():
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_IGN)  # the parent's Ctrl+C; our end is that of stdin
    become_subreaper()
    command = sys.argv[1:]
    try:
        while True:
            limit_s, size = REQUEST.unpack(read_exactly(0, REQUEST.size))
            outcome, elapsed_s, reply = serve_one(command, limit_s, read_exactly(0, size))
            write_all(1, ANSWER.pack(outcome, elapsed_s, len(reply)) + bytes(reply))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
