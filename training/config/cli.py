"""Command line of `train_sigma.py`: flags and `@files` to a SigmaConfig, and back.

Every flag comes from the declarations in `sections.py`. Words are parsed one by one, in order, so
that the later one wins and an error can name the file and line it stands in. `@files` are expanded
here and not by argparse, which knows neither byte order marks nor the place of a mistake.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.config.args_file import (
    PlacedError,
    Word,
    encode_value,
    read_text,
    read_words,
    split_argument,
)
from training.config.fields import ConfigError, Flag, iter_flags, section_titles
from training.config.presets import from_json, load_json, read_settings, to_json, without_secrets
from training.config.sigma_config import SigmaConfig
from training.config.spelling import LONG_DASHES, closest
from training.runtime.atomic_io import FileOps, replace_file

__all__ = [
    "build_parser",
    "from_json",
    "load_json",
    "parse_args",
    "to_args",
    "to_json",
    "write_resolved",
]

MAX_FILES = 100
METAVARS = {"int": "N", "float": "X", "str": "TEXT", "ints": "N,N,..."}
USAGE = "%(prog)s [@ARGS_FILE ...] [--flag value ...]"
EPILOG = """\
An args file holds one flag per line with its value; '#' starts a comment; '@other.txt' includes a
file, '@run/config.json' a JSON preset. Later settings win. Without any argument the program takes
train_sigma_args.txt beside it, else it asks which profile to run. Exit codes: 0 done or stopped on
request, 1 failure, 2 usage."""


def parse_args(argv: Sequence[str]) -> SigmaConfig:
    """Validated configuration of a command line; ConfigError is one line that names the flag.

    `--help` prints and raises SystemExit(0).
    """
    reader = _Reader()
    reader.apply([split_argument(argument) for argument in argv], opened=())
    config = SigmaConfig()
    for dest, value in vars(reader.namespace).items():
        section, _, field = dest.partition(".")
        setattr(getattr(config, section), field, value)
    return config.validate()


def to_args(config: SigmaConfig) -> str:
    """Args file that `parse_args` turns back into exactly this configuration."""
    lines, section = [], ""
    titles = section_titles(SigmaConfig)
    for flag in iter_flags(SigmaConfig):
        if flag.section != section:
            section = flag.section
            lines += ["", f"# {titles[section]}"] if lines else [f"# {titles[section]}"]
        value = getattr(getattr(config, section), flag.field)
        if flag.kind != "bool":
            lines.append(f"{flag.name} {encode_value(flag.format(value))}")
        elif value:
            lines.append(flag.name)
        elif flag.off_name:
            lines.append(flag.off_name)
    return "\n".join(lines) + "\n"


def write_resolved(config: SigmaConfig, directory: Path) -> None:
    """Write `config.json` and `resolved_args.txt`, each replaced as a whole, without the token."""
    config = without_secrets(config)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", to_json(config)), ("resolved_args.txt", to_args(config))):
        replace_file(FileOps(), directory / name, text.encode("utf-8"))


class FlagParser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        # argparse says "argument --steps: <our message>"; ours names the flag itself.
        raise ConfigError(message.partition(": ")[2] or message)


@functools.cache
def build_parser() -> FlagParser:
    """Parser of all flags, grouped by section, without defaults: it yields what was given."""
    parser = FlagParser(
        usage=USAGE,
        epilog=EPILOG,
        description="SIGMA: train and improve a small language model from scratch.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    titles = section_titles(SigmaConfig)
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for flag in iter_flags(SigmaConfig):
        _add_flag(groups[flag.section], flag)
    return parser


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40)


class _Reader:
    """Collects the settings of words and files in a namespace, later ones winning."""

    def __init__(self) -> None:
        flags = iter_flags(SigmaConfig)
        self.namespace = argparse.Namespace()
        self._parser = build_parser()
        self._flags = {flag.name: flag for flag in flags}
        self._flags |= {flag.off_name: flag for flag in flags if flag.off_name}
        self._num_files = 0

    def apply(self, words: Iterable[Word], *, opened: tuple[Path, ...]) -> None:
        """Take over all words; `opened` are the files being read, outermost first."""
        queue = deque(words)
        while queue:
            word = queue.popleft()
            try:
                if word.text.startswith("@") and not word.literal:
                    self._include(word.text[1:], opened)
                elif word.text in ("-h", "--help"):
                    self._parser.parse_args(["--help"])
                else:
                    self._set(word, queue)
            except PlacedError:
                raise
            except ConfigError as error:
                if not word.place:
                    raise
                raise PlacedError(f"{error} ({word.place})") from None

    def _set(self, word: Word, queue: deque[Word]) -> None:
        flag = self._flags.get(word.text)
        if flag is None or word.literal:
            raise self._unknown(word)
        value = word.value
        if flag.kind == "bool":
            self._refuse_value(flag, value if value is not None else _bare_text(queue))
            self._parser.parse_args([word.text], self.namespace)
            return
        if value is None:
            if not queue or (queue[0].text.startswith("--") and not queue[0].literal):
                raise ConfigError(
                    f"{flag.name} needs a value (one that starts with -- is "
                    f"written {flag.name}=--...)"
                )
            value = queue.popleft().text
        self._parser.parse_args([f"{flag.name}={value}"], self.namespace)

    def _include(self, name: str, opened: tuple[Path, ...]) -> None:
        if not name:
            raise ConfigError("@ must be followed by the name of an args file")
        path = (opened[-1].parent if opened else Path()) / name
        known = Path(os.path.normpath(path.absolute()))
        if known in opened:
            chain = " -> ".join(item.name for item in (*opened, known))
            raise ConfigError(f"args files include each other: {chain}")
        self._num_files += 1
        if self._num_files > MAX_FILES:
            raise ConfigError(f"more than {MAX_FILES} args files are included")
        if path.suffix.lower() == ".json":
            try:
                for flag, value in read_settings(read_text(path)):
                    setattr(self.namespace, flag.dest, value)
            except ConfigError as error:
                raise ConfigError(f"{error} ({path})") from None
            return
        self.apply(read_words(path), opened=(*opened, known))

    def _unknown(self, word: Word) -> ConfigError:
        if word.literal or not word.text.startswith(("-", *LONG_DASHES)):
            return ConfigError(
                f"unexpected argument {word.text[:60]!r}: flags start with --, args files with @"
            )
        return ConfigError(f"unknown flag {word.text[:60]}{closest(word.text, self._flags)}")

    @staticmethod
    def _refuse_value(flag: Flag, value: str | None) -> None:
        if value is None:
            return
        forms = f"{flag.name} or {flag.off_name}" if flag.off_name else flag.name
        raise ConfigError(f"{flag.name} takes no value, not {value[:60]!r}: write {forms}")


def _bare_text(queue: deque[Word]) -> str | None:
    """The next word if it can only be meant as a value."""
    if not queue or (queue[0].text.startswith(("-", "@", *LONG_DASHES)) and not queue[0].literal):
        return None
    return queue[0].text


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text = flag.rule.help.replace("%", "%%")
    if flag.kind == "bool":
        if flag.off_name is None:
            group.add_argument(flag.name, dest=flag.dest, action="store_true", help=text)
            return
        state = "on" if flag.default else "off"
        group.add_argument(
            flag.name,
            dest=flag.dest,
            action=argparse.BooleanOptionalAction,
            help=f"{text} [{state}]",
        )
        return
    default = flag.format(flag.default).replace("%", "%%")
    shown = f"{{{','.join(flag.rule.choices)}}}" if flag.rule.choices else METAVARS[flag.kind]
    group.add_argument(
        flag.name,
        dest=flag.dest,
        type=_converter(flag),
        metavar=shown,
        help=f"{text} [{default}]" if default else text,
    )


def _converter(flag: Flag) -> Any:
    def convert(text: str) -> Any:
        try:
            return flag.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
