"""What pip and uv print, made short: a progress line while they work, one reason when they fail."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

QUIET_S = 10.0  # where there is no terminal to redraw: a line at least this often
LARGE_MB = 20.0  # and one for every download from this size up
REDRAW_S = 0.2
UNIT_MB = {"kB": 1e-3, "MB": 1.0, "GB": 1e3, "KiB": 1.024e-3, "MiB": 1.049, "GiB": 1.074e3}

PACKAGE = re.compile(r"^(?:Collecting|Processing|Requirement already satisfied:) (\S+)")
DOWNLOAD = re.compile(r"^\s*Downloading (\S+) \((?:\S+/)?([\d.]+) ?([kMGKi]+B)\)")
COPYING = re.compile(r"^Installing collected packages: (.*)")

NO_SPACE = re.compile(
    r"No space left on device|WinError 112|not enough space on|Disk quota exceeded"
)
NO_WRITE = re.compile(r"Permission denied|WinError (?:5|32)\b|Read-only file system")
NO_TRUST = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed|UnknownIssuer")
NO_NETWORK = re.compile(
    r"Name or service not known|[Nn]ame resolution|getaddrinfo failed|nodename nor servname|"
    r"NewConnectionError|ConnectTimeoutError|Network is unreachable|Connection (?:refused|reset)|"
    r"ProxyError|Tunnel connection failed|[Rr]ead timed out|Max retries exceeded|dns error|"
    r"[Ff]ailed to (?:lookup address|establish a new connection)|error sending request"
)
NO_PACKAGE = re.compile(r"No matching distribution found for ([^\s;(]+)")
PREFIX = re.compile(r"^(?:ERROR|error|Error): ?")


def explain(output: str, *, log: Path) -> tuple[str, str]:
    """Why venv, pip or uv failed, and the mend, from what they printed."""
    if NO_SPACE.search(output):
        return "the disk is full", "free some space and run again"
    if NO_WRITE.search(output):
        mend = "close programs that use .venv, make the folder yours, and run again"
        return "no permission to write .venv or pip's own files", f"{mend} ({log})"
    if NO_TRUST.search(output):
        mend = "if a company's proxy is in between, point PIP_CERT at its certificate file"
        return "the certificate of the package index was not accepted", f"{mend} ({log})"
    # Before the next: pip that reaches no index says in the end that nothing matches.
    if NO_NETWORK.search(output):
        return "no connection to the package index", f"connect and run again ({log})"
    if match := NO_PACKAGE.search(output):
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
        machine = f"{platform.system()} {platform.machine()}"
        mend = "look at pip's sources (pip config list) or take another Python from 3.11 to 3.13"
        return f"{match[1]} is not to be had for {python} on {machine}", f"{mend} ({log})"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if PREFIX.match(line)] or lines or ["a tool failed silently"]
    return PREFIX.sub("", errors[-1]), f"all of its output is in {log}"


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 05 s`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """One step's progress: a redrawn line on a terminal, now and then a line elsewhere."""

    def __init__(self, doing: str, *, started: float, total: int, downloads: Path) -> None:
        """`started` is on time.monotonic; `total` packages are expected to pass by."""
        self.started = started
        self.total = total
        self.downloads = downloads
        self.text = doing
        self.counted = 0
        self.size_mb = 0.0
        self.is_terminal = sys.stderr.isatty()
        self.next_show = 0.0 if self.is_terminal else time.monotonic() + QUIET_S
        self.width = 0

    def read(self, line: str) -> None:
        """Take in one line of the tool's output."""
        if match := PACKAGE.match(line):
            self.counted += 1
            self.size_mb = 0.0
            name = re.split(r"[=<>;]|-\d", re.split(r"[/\\]", match[1])[-1])[0]
            self.text = f"package {self.counted} of {max(self.total, self.counted)}: {name}"
        elif match := DOWNLOAD.match(line):
            name = re.split(r"[=<>;]|-\d", match[1])[0]
            self.size_mb = float(match[2]) * UNIT_MB.get(match[3], 1.0)
            self.text = re.sub(r": .*|$", f": {name}", self.text, count=1)
            if self.size_mb >= LARGE_MB and not self.is_terminal:
                self.print_line(f"{self.text}, {self.size_mb:.0f} MB")
        elif match := COPYING.match(line):
            self.size_mb = 0.0
            count = match[1].count(",") + 1
            self.text = f"copying {count} package{'s' if count > 1 else ''} into .venv"
            if not self.is_terminal:
                self.print_line(self.text)

    def show(self) -> None:
        """Redraw the line, or print one when it is time to."""
        now = time.monotonic()
        if now < self.next_show:
            return
        text = self.text + self.received()
        if not self.is_terminal:
            self.print_line(text)
            return
        self.next_show = now + REDRAW_S
        room = shutil.get_terminal_size().columns - 1
        line = f"launch: {format_seconds(now - self.started):>6}  {text}"[:room]
        print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
        self.width = len(line)

    def received(self) -> str:
        """How much of a large download has arrived, from the size of pip's temporary file."""
        if self.size_mb < LARGE_MB:
            return ""
        sizes = [0]
        for folder, _, names in os.walk(self.downloads):
            for name in names:
                try:
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
                except OSError:  # pip has just moved it
                    continue
        return f", {min(max(sizes) / 1e6, self.size_mb):.0f} of {self.size_mb:.0f} MB"

    def print_line(self, text: str) -> None:
        """A line of its own, with the time so far."""
        self.next_show = time.monotonic() + QUIET_S
        elapsed = format_seconds(time.monotonic() - self.started)
        print(f"launch: {elapsed:>6}  {text}", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave a clean line to whatever is printed next."""
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)
