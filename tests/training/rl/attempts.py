"""300 programs that try to get out of a sandbox: 12 classes, 25 programs each.

A program is an action (the body of `act(s)`) and a vehicle that carries it: the main thread, a
thread, a forked process, another interpreter. `s` says where the targets are, never what they
hold. A program has succeeded if it returns the canary, says `made N` with N above what is allowed,
or has left a trace on the host (`scene.Scene.traces`).
"""

from __future__ import annotations

import textwrap

from tests.training.rl.attempt_actions import CLASSES

NUM_PER_CLASS = 25

MODULES = (
    "asyncio concurrent.futures ctypes fcntl http.client mmap multiprocessing os select signal "
    "socket stat struct subprocess sys tempfile threading time urllib.request"
).split()
COMMON = """
libc = ctypes.CDLL(None)
MB = 2 ** 20

def fill_file(path, megabytes=25):
    with open(path, "wb", buffering=0) as file:
        try:
            for part in range(megabytes):
                file.write(bytes(MB))
        except OSError:
            pass
        made = os.fstat(file.fileno()).st_blocks * 512
    os.unlink(path)
    return "made %d" % made

def each(use):
    found = []
    for number in range(3, 64):
        try:
            if stat.S_ISREG(os.fstat(number).st_mode):
                found.append(use(number))
        except (OSError, ValueError):
            pass
    return "".join(found)

def beat(s):
    for count in range(200):
        try:
            open(s["beat"], "a").write(".")
        except OSError:
            pass
        time.sleep(0.02)
    os._exit(0)

def act(s):
"""

VEHICLES = {
    "direct": "def attempt(s):\n    return act(s)",
    "thread": """
def attempt(s):
    found = []
    carrier = threading.Thread(target=lambda: found.append(act(s)))
    carrier.start()
    carrier.join()
    return found
""",
    "fork": """
def attempt(s):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        try:
            with open(writing, "w") as answer:
                answer.write(repr(act(s)))
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        return answer.read()
""",
    "interpreter": """
def attempt(s):
    code = SOURCE + "\\nprint(act(" + repr(s) + "))"
    command = [sys.executable, "-I", "-S", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, close_fds=False).stdout
""",
}


def attempts_of(kind: str) -> list[str]:
    """The 25 programs of one class; each defines `attempt(s)`."""
    vehicles = [name for name in VEHICLES if kind != "time" or name != "thread"]
    programs = []
    for body in CLASSES[kind].strip("\n").split("\n---\n"):
        source = COMMON + textwrap.indent(body, "    ") + "\n    return None\n"
        used = [name for name in MODULES if name + "." in source]
        source = f"import {', '.join([*used, 'subprocess', 'sys', 'threading'])}\n{source}"
        for vehicle in vehicles:
            programs.append(f"SOURCE = {source!r}\nexec(SOURCE)\n{VEHICLES[vehicle]}")
    return programs[:NUM_PER_CLASS]
