"""Fill `.venv`: make it, bring the packages in with pip and uv, see PyTorch import.

PyTorch decides the size of everything. On Linux the default index serves its CUDA build with
several GB of libraries, so a machine without CUDA tries in this order, and says which it took: what
pip would take here anyway, where that is a CPU build (pip's own settings may offer one); `uv pip
install --torch-backend cpu`, since uv knows where PyTorch keeps its CPU builds; the default build.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from scripts.packages import CPU, GIGABYTE, PackageSet, SetupError, python_of
from scripts.pip_output import REDRAW_S, Progress, explain, format_seconds

UV = "uv==0.13.8"
TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
CUDA_PREFIXES = ("nvidia-", "cuda-")
CUDA_BYTES = 10 * GIGABYTE
ELSEWHERE = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
PIP_SETTINGS = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_USER": "0",
    "PIP_PROGRESS_BAR": "off",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
}
PATIENCE_S = 5.0
REPORT = "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available()]))"


def say(text: str) -> None:
    """One line to the user; standard output belongs to the program."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def read_pins(lockfile: Path) -> dict[str, str]:
    """Package to version, from the `name==version ; marker` lines of a lockfile."""
    pattern = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)
    return dict(pattern.findall(lockfile.read_text(encoding="utf-8")))


class Installer:
    """The steps that make one environment."""

    def __init__(self, venv: Path, *, root: Path, packages: PackageSet, lock: BinaryIO) -> None:
        """`lock` is the held set-up lock: if the launcher is killed, its tools still hold it."""
        self.venv = venv
        self.python = str(python_of(venv))
        self.packages = packages
        self.lockfile = root / packages.lockfile
        self.lock = lock
        self.log = root / ".runtime_cache" / "setup.log"
        self.downloads = root / ".runtime_cache" / "downloads"
        self.pins = read_pins(self.lockfile)
        self.started = time.monotonic()
        self.log.write_bytes(b"")

    def create(self) -> None:
        """Make an empty environment with pip in it, in place of whatever was there."""
        if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(
                "this Python came without venv",
                f"install it (Debian and Ubuntu: apt install python{version}-venv) and run again",
            )
        self.check_space(self.packages.needs_bytes)
        # Inside an environment sys.executable is the very file that is about to be replaced.
        python = getattr(sys, "_base_executable", None) or sys.executable
        doing = "emptying the old .venv" if self.venv.exists() else "making an empty .venv"
        self.run([python, "-m", "venv", "--clear", str(self.venv)], doing=doing)

    def install(self) -> None:
        """Bring the packages of the lockfile into the environment and see PyTorch import."""
        # pip unpacks through the temporary folder: on the disk of .venv, not in a small /tmp.
        shutil.rmtree(self.downloads, ignore_errors=True)
        self.downloads.mkdir(parents=True)
        try:
            extra = self.prepare_torch()
            self.pip("install", "--requirement", str(self.lockfile), *extra, doing="packages")
        finally:
            shutil.rmtree(self.downloads, ignore_errors=True)
        output = self.run([self.python, "-c", REPORT], doing="a first look at PyTorch")
        self.report_ready(*json.loads(output.splitlines()[-1]))

    def report_ready(self, version: str, has_cuda: bool) -> None:
        """The closing line, with what PyTorch says of itself."""
        elapsed = format_seconds(time.monotonic() - self.started)
        say(f"ready after {elapsed}: torch {version} on {'CUDA' if has_cuda else 'the CPU'}")
        if self.packages is not CPU and not has_cuda:
            say(
                "this PyTorch cannot use the NVIDIA driver, which is probably too old: "
                "update the driver; until then everything runs on the CPU"
            )

    def prepare_torch(self) -> list[str]:
        """Install PyTorch where the lockfile alone would bring a wrong build.

        Returns requirements for pip to take beside the lockfile.
        """
        torch = f"torch=={self.pins['torch']}"
        if self.packages is CPU:
            if sys.platform == "linux":  # elsewhere the default build is the CPU build
                self.prepare_cpu_torch(torch)
        elif self.packages.backend is None:
            # A CPU build among pip's own sources sorts above the plain version; === excludes it.
            if "+cpu" in self.ask_pip(torch)["torch"]:
                return [torch.replace("==", "===")]
        else:
            self.uv(*(f"{name}=={self.pins[name]}" for name in TORCH_FAMILY if name in self.pins))
        return []

    def prepare_cpu_torch(self, torch: str) -> None:
        """See to it that pip, given the lockfile, needs no CUDA packages; say so where it does."""
        found = self.ask_pip(torch)
        if not any(name.startswith(CUDA_PREFIXES) for name in found):
            say(f"pip takes torch {found['torch']}, without CUDA packages")
            return
        say(f"pip would take the CUDA build of {torch}: asking uv for the CPU build")
        try:
            self.uv(torch)
        except SetupError as error:
            say(f"uv could not get it ({error.cause})")
            say(f"taking the default build of {torch}: several GB to download, more on disk")
            self.check_space(CUDA_BYTES)

    def ask_pip(self, requirement: str) -> dict[str, str]:
        """What pip would install for a requirement, name to version, without downloading it."""
        report = self.downloads / "report.json"
        self.pip(
            *("install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)),
            *("--constraint", str(self.lockfile), requirement),
            doing="asking pip which PyTorch it would take",
        )
        found = [entry["metadata"] for entry in json.loads(report.read_bytes())["install"]]
        return {entry["name"].lower().replace("_", "-"): entry["version"] for entry in found}

    def pip(self, *arguments: str, doing: str) -> None:
        """Run the environment's pip."""
        self.run([self.python, "-m", "pip", *arguments], doing=doing)

    def uv(self, *requirements: str) -> None:
        """Install PyTorch packages from where uv knows this set's build to be."""
        self.pip("install", UV, doing="uv")
        backend = str(self.packages.backend)
        self.run(
            [
                *(self.python, "-m", "uv", "pip", "install", "--python", self.python),
                *("--torch-backend", backend, "--constraint", str(self.lockfile), *requirements),
            ],
            doing=f"PyTorch ({backend})",
        )

    def check_space(self, needs_bytes: int) -> None:
        """Raise SetupError when the disk cannot hold what is about to come."""
        folder = self.lockfile.parent
        free = shutil.disk_usage(folder).free
        if free < needs_bytes:
            raise SetupError(
                f"the set-up needs about {needs_bytes / GIGABYTE:.0f} GB and the disk of {folder} "
                f"has {free / GIGABYTE:.1f} GB left",
                "free some space and run again",
            )

    def run(self, command: list[str], *, doing: str) -> str:
        """Run one tool with progress; returns its output, raises SetupError with the reason."""
        env = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
        env |= PIP_SETTINGS
        if self.downloads.is_dir():
            env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.downloads))
        progress = Progress(
            doing, started=self.started, total=len(self.pins), downloads=self.downloads
        )
        kept = () if os.name == "nt" else (self.lock.fileno(),)
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            encoding="utf-8",
            errors="replace",
            pass_fds=kept,
        )
        lines: list[str] = []
        finished = False
        try:
            with self.log.open("a", encoding="utf-8") as log:
                for line in lines_of(child):
                    if line:
                        lines.append(line)
                        log.write(line)
                        progress.read(line)
                    progress.show()
            finished = True
        finally:
            if not finished:  # Ctrl+C: no tool may go on writing after the launcher has ended
                end(child)
            child.wait()
            progress.clear()
        if child.returncode != 0:
            raise SetupError(*explain("".join(lines), log=self.log))
        return "".join(lines)


def end(child: subprocess.Popen[str]) -> None:
    """Ask the child to stop, and after a moment do not ask."""
    child.terminate()
    try:
        child.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def lines_of(child: subprocess.Popen[str]) -> Iterator[str]:
    """The child's output by lines, with an empty string whenever it is silent for a moment."""
    assert child.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def pump(stream: Iterator[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, args=(child.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=REDRAW_S)
        except queue.Empty:
            yield ""
            continue
        if line is None:
            return
        yield line
