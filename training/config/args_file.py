"""Text of args files: one flag per line, its value after white space; read and written exactly.

The grammar, chosen so that what people type works unchanged (no shell rules: a shell parser eats
the backslashes of `runs\\sigma_debug`):
- `--flag value`, `--flag=value`, or the value on the next line; `@other.txt` includes a file.
- `#` at the start of a line or after white space starts a comment.
- A value in double quotes loses them and nothing else: blanks at its ends and `#` survive.
- `json:"..."` is a JSON string, for what a line cannot hold; only the writer needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from training.config.fields import ConfigError

MAX_FILE_BYTES = 2**20
FLAG_LINE = re.compile(r"(--[^\s=]*)(?:=|\s+|$)(.*)", re.DOTALL)
QUOTED = re.compile(r'"(.*?)"(?:\s+#.*)?', re.DOTALL)
COMMENT = re.compile(r"(?:^|\s)#.*", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class PlacedError(ConfigError):
    """A ConfigError whose message already names the file and line of the mistake."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Word:
    """One piece of a command line or args file: a flag, perhaps with its value, or a bare text.

    value: what is attached to a flag; None = the next word may be its value.
    literal: a quoted text, which is neither flag nor `@file`.
    place: file and line for messages, "" on the command line.
    """

    text: str
    value: str | None = None
    literal: bool = False
    place: str = ""


def split_argument(argument: str) -> Word:
    """A command-line argument as a word; `--flag=value` is taken apart."""
    name, equals, value = argument.partition("=")
    if argument.startswith("--") and equals:
        return Word(text=name, value=value)
    return Word(text=argument)


def read_words(path: Path) -> Iterator[Word]:
    """The words of an args file, line by line; ConfigError on a file that is no text file."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", read_text(path)), start=1):
        place = f"{path} line {number}"
        try:
            word = _parse_line(line.strip(), place)
        except ConfigError as error:
            raise PlacedError(f"{error} ({place})") from None
        if word is not None:
            yield word


def decode_value(text: str) -> str | None:
    """The value written as `text`; None if there is nothing but blanks or a comment."""
    text = text.strip()
    if text.startswith('json:"'):
        return _decode_json(text[len("json:") :])
    if match := QUOTED.fullmatch(text):
        return match[1]
    return COMMENT.sub("", text).rstrip() or None


def encode_value(value: str) -> str:
    """The plainest text that `decode_value` reads back as exactly `value`."""
    as_json = f"json:{json.dumps(value)}"
    if CONTROL.search(value) or "\n" in value or "\r" in value:
        return as_json
    for text in (value, f'"{value}"'):
        if decode_value(text) == value:
            return text
    return as_json


def _parse_line(line: str, place: str) -> Word | None:
    if match := FLAG_LINE.fullmatch(line):
        value = decode_value(match[2])
        if value is None and line[len(match[1]) :].startswith("="):
            value = ""
        return Word(text=match[1], value=value, place=place)
    literal = line.startswith(('"', 'json:"'))
    text = f"@{decode_value(line[1:]) or ''}" if line.startswith("@") else decode_value(line)
    return None if text is None else Word(text=text, literal=literal, place=place)


def _decode_json(text: str) -> str:
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"json: is not followed by a JSON string: {error.msg}") from None
    if decode_value(text[end:]) is not None:
        raise ConfigError("there is text after the JSON string")
    return value


def read_text(path: Path) -> str:
    """Text of a small UTF-8 file, with or without a byte order mark; ConfigError otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}{_mend_of_missing(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than 1 MiB: it is no args file")
    if data[:2] in BYTE_ORDER_MARKS:
        raise ConfigError(f"{path} is saved as UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is no UTF-8 text (byte 0x{data[error.start]:02x} in line {line}): "
            "save it as UTF-8"
        ) from None
    if found := CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError(f"{path} is no text file (byte 0x{ord(found[0]):02x} in line {line})")
    return text


def _mend_of_missing(path: Path) -> str:
    """The file that is perhaps meant, there or among the profiles, as the end of a message."""
    if not path.parent.is_dir():
        return f", nor a folder {path.parent}; check the path"
    near = [file for folder in (path.parent / "profiles", path.parent) for file in _files(folder)]
    by_stem = {file.stem: file for file in near}
    close = get_close_matches(path.stem, by_stem, n=1)
    return f"; did you mean {by_stem[close[0]]}?" if close else "; check the path"


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.is_file())
    except OSError:
        return []
