"""JSON form of a configuration: `{"run": {"steps": 500}, "model": {...}}`.

The same settings as the flags, by section and field name. A file may hold a part only; what it
does not name keeps its value. Written files hold everything.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config.args_file import read_text
from training.config.fields import ConfigError, Flag, iter_flags
from training.config.sigma_config import SigmaConfig
from training.config.spelling import closest


def without_secrets(config: SigmaConfig) -> SigmaConfig:
    """The configuration as it may be written to a file: without the hub's token."""
    return replace(config, stream=replace(config.stream, hf_token=""))


def to_dict(config: SigmaConfig) -> dict[str, dict[str, Any]]:
    """JSON-able values of every setting by section; tuples become lists."""
    result: dict[str, dict[str, Any]] = {}
    for flag in iter_flags(SigmaConfig):
        value = getattr(getattr(config, flag.section), flag.field)
        result.setdefault(flag.section, {})[flag.field] = (
            list(value) if isinstance(value, tuple) else value
        )
    return result


def to_json(config: SigmaConfig) -> str:
    """The whole configuration as JSON text with an end of line, secrets included."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> SigmaConfig:
    """Configuration from JSON text; ConfigError for unknown names, wrong types, broken rules."""
    config = SigmaConfig()
    for flag, value in read_settings(text):
        setattr(getattr(config, flag.section), flag.field, value)
    return config.validate()


def load_json(path: Path) -> SigmaConfig:
    """Configuration from a JSON file such as `<output_dir>/config.json`."""
    try:
        return from_json(read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{error} ({path})") from None


def read_settings(text: str) -> list[tuple[Flag, Any]]:
    """The settings that a JSON text names, each with its checked value, in order."""
    known: dict[str, dict[str, Flag]] = {}
    for flag in iter_flags(SigmaConfig):
        known.setdefault(flag.section, {})[flag.field] = flag
    settings = []
    for section, values in _expect_object(_decode(text), "the file").items():
        if section not in known:
            raise ConfigError(f"unknown section {section!r}{closest(section, list(known))}")
        for field, value in _expect_object(values, f"section {section!r}").items():
            if field not in known[section]:
                raise ConfigError(
                    f"unknown setting {field!r} in section {section!r}"
                    f"{closest(field, list(known[section]))}"
                )
            settings.append((known[section][field], known[section][field].check(value)))
    return settings


def _decode(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"no valid JSON: {error.msg} in line {error.lineno}") from None
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no valid JSON: {error}") from None


def _expect_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} must be a JSON object of names and values")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice!r} is given twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ConfigError(f"{name} is no JSON number")
