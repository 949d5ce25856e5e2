"""How a flag is declared: one dataclass field with its help text and its allowed values.

Everything else is derived from that one declaration: the command line, args files, JSON presets,
`--help`, range checks and the error messages. The help text is data because source code, and with
it docstrings, need not exist in a frozen program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, get_type_hints

KINDS: dict[Any, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple[int, ...]: "ints",
}
EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "ints": "whole numbers separated by commas",
}
LARGEST_INT = 10**15


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line naming the flag and the mend."""


@dataclass(slots=True, kw_only=True, frozen=True)
class Rule:
    """What a value may be. `above`/`below` exclude their bound, `minimum`/`maximum` include it."""

    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    is_path: bool = False


@dataclass(slots=True, kw_only=True, frozen=True)
class Flag:
    """One setting: where it lives in the configuration and how it is written."""

    section: str
    field: str
    name: str
    kind: str
    default: Any
    rule: Rule

    @property
    def dest(self) -> str:
        return f"{self.section}.{self.field}"

    @property
    def off_name(self) -> str | None:
        """`--no-x` of a boolean `--x`; None for other kinds and for `--no-...` switches."""
        if self.kind != "bool" or self.name.startswith("--no-"):
            return None
        return f"--no-{self.name[2:]}"

    def parse(self, text: str) -> Any:
        """Value of a flag written as text; ConfigError if it is not of the flag's kind."""
        try:
            return self.check(self._convert(text))
        except (ValueError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._mismatch(text) from None

    def check(self, value: Any) -> Any:
        """The value in its canonical type; ConfigError if its type or range is wrong."""
        kind = self.kind
        if kind == "ints":
            if not isinstance(value, list | tuple):
                raise self._mismatch(value)
            return tuple(self._check_scalar("int", item) for item in value)
        return self._check_scalar(kind, value)

    def format(self, value: Any) -> str:
        """Text that `parse` turns back into exactly this value (not for booleans)."""
        if self.kind == "ints":
            return ",".join(repr(item) for item in value)
        return value if isinstance(value, str) else repr(value)

    def _convert(self, text: str) -> Any:
        match self.kind:
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "ints":
                return tuple(int(item) for item in text.split(",")) if text.strip() else ()
            case "str":
                return text
        raise ConfigError(f"{self.name} takes no value; write {self.name} or {self.off_name}")

    def _check_scalar(self, kind: str, value: Any) -> Any:
        if kind == "bool":
            if not isinstance(value, bool):
                raise self._mismatch(value)
            return value
        if kind == "str":
            return self._check_text(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and (kind == "int" or not isinstance(value, float)):
            raise self._mismatch(value)
        self._check_range(value)
        return float(value) if kind == "float" else value

    def _check_text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise self._mismatch(value)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ConfigError(f"{self.name} holds bytes that are not UTF-8 text")
        rule = self.rule
        if rule.choices and value not in rule.choices:
            raise ConfigError(
                f"{self.name} must be one of {', '.join(rule.choices)}, not {_shown(value)}"
            )
        if rule.is_path and any(char < " " for char in value):
            raise ConfigError(f"{self.name} must be a path on one line, not {_shown(value)}")
        return value

    def _check_range(self, value: float) -> None:
        rule = self.rule
        largest = LARGEST_INT if rule.maximum is None else rule.maximum
        smallest = -LARGEST_INT if rule.minimum is None else rule.minimum
        demand = ""
        if isinstance(value, float) and not math.isfinite(value):
            demand = "a finite number"
        elif rule.above is not None and value <= rule.above:
            demand = f"greater than {rule.above:g}"
        elif rule.below is not None and value >= rule.below:
            demand = f"less than {rule.below:g}"
        elif value < smallest:
            demand = f"at least {smallest:g}"
        elif value > largest:
            demand = f"at most {largest:g}"
        if demand:
            raise ConfigError(f"{self.name} must be {demand}, not {_shown(value)}")

    def _mismatch(self, value: Any) -> ConfigError:
        return ConfigError(f"{self.name} takes {EXPECTED[self.kind]}, not {_shown(value)}")


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    is_path: bool = False,
) -> Any:
    """Declare a setting as a dataclass field; `help` is one line and gives the unit."""
    rule = Rule(
        help=help,
        choices=choices,
        minimum=minimum,
        maximum=maximum,
        above=above,
        below=below,
        is_path=is_path,
    )
    return dataclasses.field(default=default, metadata={"rule": rule})


def section(kind: type, *, title: str, prefix: str = "") -> Any:
    """Declare a group of settings; with a prefix its field `x` becomes the flag `--<prefix>-x`."""
    return dataclasses.field(
        default_factory=kind, metadata={"title": title, "prefix": prefix, "kind": kind}
    )


@functools.cache
def iter_flags(config_class: type) -> tuple[Flag, ...]:
    """All flags of a configuration class in order of declaration."""
    flags = []
    for outer in dataclasses.fields(config_class):
        kind, prefix = outer.metadata["kind"], outer.metadata["prefix"]
        hints = get_type_hints(kind)
        for inner in dataclasses.fields(kind):
            name = inner.name.replace("_", "-")
            flags.append(
                Flag(
                    section=outer.name,
                    field=inner.name,
                    name=f"--{prefix}-{name}" if prefix else f"--{name}",
                    kind=KINDS[hints[inner.name]],
                    default=inner.default,
                    rule=inner.metadata["rule"],
                )
            )
    return tuple(flags)


def section_titles(config_class: type) -> dict[str, str]:
    """Title of every section by its name, in order of declaration."""
    return {outer.name: outer.metadata["title"] for outer in dataclasses.fields(config_class)}


def _shown(value: Any) -> str:
    """A value as it appears in a one-line message."""
    text = repr(value) if not isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
