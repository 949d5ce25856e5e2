"""What a program could reach if nothing held it: secrets, listeners, a process to attack.

Everything that can be read holds one random canary; everything that can be changed is looked at
after each attempt and put back.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

# Answers each line on its input with what has happened to it; sleeps otherwise.
VICTIM = """
import ctypes, json, mmap, os, signal, sys
canary, folder = sys.argv[1:]
os.chdir(folder)
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1).value, 0, 0, 0)  # PR_SET_PTRACER_ANY
secret, flag = ctypes.create_string_buffer(canary.encode(), 64), ctypes.create_string_buffer(16)
opened, named = open("secret"), open(canary, "rb")
mapped = mmap.mmap(named.fileno(), 0, prot=mmap.PROT_READ)
count = [0]
for number in (signal.SIGUSR1, signal.SIGIO):
    signal.signal(number, lambda *_: count.__setitem__(0, count[0] + 1))
everywhere, dump = os.sched_getaffinity(0), open("/proc/self/coredump_filter").read()
adjust = open("/proc/self/oom_score_adj").read()
print(json.dumps({"address": ctypes.addressof(secret), "flag": ctypes.addressof(flag),
                  "victim_fd": opened.fileno()}), flush=True)
for line in sys.stdin:
    found = {"signals": count[0], "memory": flag.value.decode(),
             "affinity": os.sched_getaffinity(0) != everywhere,
             "dump": open("/proc/self/coredump_filter").read() != dump,
             "oom": open("/proc/self/oom_score_adj").read() != adjust}
    count[0], flag.value = 0, b""
    os.sched_setaffinity(0, everywhere)
    open("/proc/self/coredump_filter", "w").write("0x" + dump)
    if found["oom"]:
        open("/proc/self/oom_score_adj", "w").write(adjust)
    print(json.dumps(found), flush=True)
"""
# What a plain subprocess with a time limit is: no lock, everything inherited, one SIGTERM. Its
# limit is one of CPU time, so that a busy machine does not end an attempt that would succeed.
CONTROL_STUCK_S = 1800
CONTROL = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
job = json.load(sys.stdin)
names = {}
exec(job["program"], names)
print(names["attempt"](job["scene"]))
"""


class Scene:
    """Targets of all classes of attempts, in a new directory; `close` ends what it started."""

    def __init__(self, folder: Path) -> None:
        self.canary = "canary" + secrets.token_hex(16)
        self.folder = folder
        (folder / "secret").write_text(self.canary)
        (folder / self.canary).write_text("named so")
        (folder / "target").write_text("original")
        self.received: list[str] = []
        self._sockets: list[socket.socket] = []
        self._descriptors = [os.open(folder / "target", os.O_RDWR)]
        self._descriptors.append(os.open(folder / "secret", os.O_RDONLY))
        for descriptor in self._descriptors:
            os.set_inheritable(descriptor, True)
        self.places = self._listen()
        self._start_victim()

    def _start_victim(self) -> None:
        self.victim = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", VICTIM, self.canary, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SIGMA_CANARY": self.canary},
            start_new_session=True,
        )
        assert self.victim.stdout is not None
        self.places |= json.loads(self.victim.stdout.readline())

    def _listen(self) -> dict[str, object]:
        name = "\0sigma" + secrets.token_hex(8)
        tcp = self._serve(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        udp = self._serve(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._serve(socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "door"))
        self._serve(socket.AF_UNIX, socket.SOCK_STREAM, name)
        self._serve(socket.AF_UNIX, socket.SOCK_DGRAM, name + "d")
        places = {"tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "abstract": name}
        return places | {"unix": str(self.folder / "door"), "abstract_datagram": name + "d"}

    def _serve(self, family: int, kind: int, address) -> socket.socket:
        server = socket.socket(family, kind)
        server.bind(address)
        if kind == socket.SOCK_STREAM:
            server.listen(64)
        server.setblocking(False)
        self._sockets.append(server)
        threading.Thread(target=self._greet, args=(server,), daemon=True).start()
        return server

    def _greet(self, server: socket.socket) -> None:
        """Say the canary to whoever connects, at once."""
        if server.type != socket.SOCK_STREAM:
            return
        server.setblocking(True)
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            self.received.append("connection")
            with caller:
                try:
                    caller.sendall(self.canary.encode())
                except OSError:
                    continue  # gone already

    def described(self, number: int) -> dict[str, object]:
        """What an attempt is told."""
        return self.places | {
            "secret": str(self.folder / "secret"),
            "target": str(self.folder / "target"),
            "folder": str(self.folder),
            "drop": str(self.folder / "drop"),
            "beat": str(self.folder / f"beat{number}"),
            "name": f"attempt{number}",
            "victim": self.victim.pid,
        }

    def traces(self) -> list[str]:
        """What has changed on the host since the last call; it is put back."""
        assert self.victim.stdin is not None and self.victim.stdout is not None
        print(file=self.victim.stdin, flush=True)
        found = [key for key, value in json.loads(self.victim.stdout.readline()).items() if value]
        target, drop = self.folder / "target", self.folder / "drop"
        if not target.exists() or target.read_text() != "original":
            found.append("target")
            target.write_text("original")
            replacement = os.open(target, os.O_RDWR)
            os.dup2(replacement, self._descriptors[0], inheritable=True)
            os.close(replacement)
        if drop.is_symlink():
            found.append("link")
            drop.unlink()
        found += self._datagrams() + self.received
        self.received.clear()
        return found

    def _datagrams(self) -> list[str]:
        found = []
        for server in self._sockets:
            try:
                if server.type == socket.SOCK_DGRAM and server.recv(9):
                    found.append("datagram")
            except BlockingIOError:
                pass
        return found

    def run_unsandboxed(self, program: str, number: int, *, folder: Path) -> str:
        """What the program prints in a plain child process that inherits everything."""
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CONTROL],
            input=json.dumps({"program": program, "scene": self.described(number)}),
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "SIGMA_CANARY": self.canary},
            close_fds=False,
            timeout=CONTROL_STUCK_S,
        )
        return run.stdout

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        for server in self._sockets:
            # Closing alone would leave a thread in accept().
            try:
                server.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            server.close()
        self.victim.kill()
        self.victim.communicate()
