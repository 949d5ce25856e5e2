"""`--mode support`: one archive with what a bug report needs, and nothing that is private.

In it: settings, the newest metrics rows, crash reports and stack dumps, the list of checkpoints,
and what `--mode doctor` finds. Not in it: weights, training text, samples, environment variables.
Every text is redacted as a crash report is, and names of this user's home are replaced as well.
Nothing is sent anywhere; the user reads the archive and decides.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import socket
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from training.config.presets import to_dict
from training.config.sigma_config import ConfigError, SigmaConfig
from training.modes.doctor import examine
from training.runtime.atomic_io import FileOps, replace_file
from training.runtime.manifest import MANIFEST_NAME
from training.runtime.redact import MARK, Redactor

SETTINGS = ("config.json", "resolved_args.txt", "status_latest.json", "integrity_manifest.json")
NEWEST_REPORTS = 20
TAIL_BYTES = 2 * 2**20
HOME_MARK, HOST_MARK = "[home]", "[host]"
README = """What a bug report about SIGMA needs, from one run directory. Read it before you send it.

doctor.json        what this machine has and lacks
settings/          the run's settings, as it resolved them
metrics.jsonl      its newest rows, errors/ its newest crash reports and stack dumps
checkpoints.json   names, sizes and steps; no weights, no samples, no training text is included

Tokens, passwords and keys were replaced by {mark}, the home directory by {home}, the name of this
machine by {host}.
"""


def run(config: SigmaConfig) -> int:
    """Write `<output_dir>/support_<time>.zip` and print its path."""
    output_dir = Path(config.run.output_dir)
    if not output_dir.is_dir():
        raise ConfigError(f"--output-dir {output_dir} holds no run to report on")
    path = output_dir / f"support_{datetime.now(UTC):%Y%m%dT%H%M%SZ}.zip"
    replace_file(FileOps(), path, pack(config), durable=False)
    if config.run.json:
        print(json.dumps({"support": str(path)}))
    else:
        print(f"{path}\nread it before you send it; nothing was sent anywhere")
    return 0


def pack(config: SigmaConfig) -> bytes:
    """The archive: a zip of redacted UTF-8 texts."""
    cleaner = TextCleaner(Redactor.from_environment(os.environ))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in collect(config):
            archive.writestr(cleaner.clean(name), cleaner.clean(text))
        notes = README.format(mark=MARK, home=HOME_MARK, host=HOST_MARK)
        archive.writestr("README.txt", notes)
    return buffer.getvalue()


class TextCleaner:
    """Redacts secrets, this user's home directory and the name of the machine."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._names = personal_names()

    def clean(self, text: str) -> str:
        """The text with marks in the place of what is private; the rest stays as it is."""
        # Secrets first: one that holds a name would not be known without it.
        text = self._redactor.clean(text)
        for name, mark in self._names:
            text = name.sub(mark, text)
        return text


def personal_names() -> list[tuple[re.Pattern[str], str]]:
    """What names this user and machine, each with its mark, in the order of replacing."""
    hosts = sorted({socket.gethostname(), platform.node()}, key=len, reverse=True)
    names = [(host, re.compile(re.escape(host)), HOST_MARK) for host in hosts]
    try:
        home = str(Path.home())
        names.insert(0, (home, path_pattern(home), HOME_MARK))
    except RuntimeError:  # no home directory can be told
        pass
    return [(pattern, mark) for name, pattern, mark in names if len(name) > 3]


def path_pattern(path: str) -> re.Pattern[str]:
    """Finds a path however often it was escaped: an error's message holds its repr, JSON escapes
    that again, and a stack dump writes ASCII only. Windows' names are the same in any case."""
    spelled = (_spellings(character) for character in re.sub(r"[\\/]+", "/", path))
    windows = re.match(r"[A-Za-z]:|\\\\", path) is not None
    return re.compile("".join(spelled), re.IGNORECASE if windows else 0)


def _spellings(character: str) -> str:
    """A pattern for one character of a path in plain text, repr, ASCII and JSON."""
    if character == "/":
        return r"[\\/]+"
    if character in "'\"":
        return rf"\\*{character}"
    if character.isascii():
        return re.escape(character)
    escaped = {
        text[1:-1].replace("\\", r"\\+") for text in (ascii(character), json.dumps(character))
    }
    return f"(?:{'|'.join([character, *sorted(escaped)])})"


def collect(config: SigmaConfig) -> Iterator[tuple[str, str]]:
    """Name and text of every part, unredacted."""
    output_dir = Path(config.run.output_dir)
    yield "doctor.json", json.dumps([asdict(check) for check in examine(config)], indent=2)
    yield "flags.json", json.dumps(to_dict(config), indent=2, sort_keys=True)
    yield "checkpoints.json", json.dumps(list_checkpoints(Path(config.run.checkpoint_dir)))
    for name in SETTINGS:
        if (output_dir / name).is_file():
            yield f"settings/{name}", read_tail(output_dir / name)
    if (output_dir / "metrics.jsonl").is_file():
        yield "metrics.jsonl", read_tail(output_dir / "metrics.jsonl")
    reports = [p for p in (output_dir / "errors").glob("*") if p.suffix in (".json", ".txt")]
    for path in sorted(reports, key=_written_ns)[-NEWEST_REPORTS:]:
        yield f"errors/{path.name}", read_tail(path)


def read_tail(path: Path) -> str:
    """The last two MiB of a text, from the beginning of a line; a line says why if unreadable."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except OSError as error:
        return f"{path.name} could not be read: {error.strerror or error}\n"
    if size > len(data):
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


def list_checkpoints(directory: Path) -> list[dict[str, object]]:
    """Name, size in bytes and whether it is committed, for everything that stands there.

    Size None: it could not be read, or a run that goes on has just deleted it.
    """
    if not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir() and (path.name.startswith("checkpoint_step_")):
            found.append(
                {
                    "name": path.relative_to(directory).as_posix(),
                    "num_bytes": _num_bytes(path),
                    "committed": (path / MANIFEST_NAME).is_file(),
                }
            )
    return found


def _num_bytes(directory: Path) -> int | None:
    try:
        return sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    except OSError:
        return None


def _written_ns(path: Path) -> int:
    """When a file was changed last; 0 if that cannot be told."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
