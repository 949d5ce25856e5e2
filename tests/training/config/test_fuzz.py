"""R21: 20,000 random args files and presets; each is refused in one line or comes back unchanged.

Refused means exit code 2 with one line on stderr, and nothing written; taken means that writing the
configuration and reading it again gives the same one. Never a traceback. The negative controls
break reader and writer and see the suite fail.
"""

import io
import json
import os
import random
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import train_sigma
from training.config.cli import from_json, parse_args, to_args, to_json
from training.config.fields import ConfigError, iter_flags
from training.config.sigma_config import SigmaConfig

NUM_ARGS_FILES = 14_000
NUM_PRESETS = 6_000
FLAGS = iter_flags(SigmaConfig)
JUNK = [
    "", "0", "-1", "1e400", "nan", "ten", "1_000", "0x10", "true", "--", "-", "@", "@@", "=", "#",
    '"', '""', "'", "\\", "%s", "{}", "$HOME", "json:", 'json:"', 'json:"a\\n"', "a b", "\u00e9",
    "\u2028", "\ufeff", "\U0001f600", "٣", "9" * 400, "1,2", ",", "[1]", "None", "\t", "../..",
]  # fmt: skip


def random_value(rng: random.Random, flag) -> str:
    if rng.random() < 0.3:
        return rng.choice(JUNK)
    if flag.rule.choices:
        return rng.choice(flag.rule.choices)
    if flag.kind == "float":
        return repr(rng.uniform(0.0, 1.0))
    return flag.format(flag.default) if rng.random() < 0.7 else str(rng.randint(-3, 2000))


def random_line(rng: random.Random, names: list[str]) -> str:
    kind = rng.random()
    if kind < 0.08:
        return rng.choice(["", "# comment", "   ", "#", rng.choice(JUNK)])
    if kind < 0.12:
        return f"@{rng.choice([*names, 'missing.txt', '.', ''])}"
    flag = rng.choice(FLAGS)
    name = flag.off_name if flag.off_name and rng.random() < 0.5 else flag.name
    if rng.random() < 0.03:
        position = rng.randrange(len(name))
        name = name[:position] + rng.choice("-_xé= ") + name[position + 1 :]
    if flag.kind == "bool" and rng.random() < 0.95:
        return name
    separator = rng.choice([" ", " ", "\t", "=", "\n", "  # c\n", ""])
    comment = rng.choice(["", "", "", " # why", "#"])
    return f"{name}{separator}{random_value(rng, flag)}{comment}"


def random_file(rng: random.Random, names: list[str]) -> bytes:
    lines = [random_line(rng, names) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5, 20]))]
    text = rng.choice(["\n", "\r\n", "\r"]).join(lines)
    data = text.encode(rng.choice(["utf-8"] * 18 + ["utf-8-sig", "utf-16"]))
    if data and rng.random() < 0.05:
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(data))
            data = data[:position] + rng.randbytes(1) + data[position + 1 :]
    return data


VALUES = [
    0, 1, -1, 2**70, 1e308, -0.0, 0.5, True, False, None, "", "x", "auto", "1", [], [1, 2], [None],
    [2, 3, 4], ["a"], {}, {"a": 1}, "\n", "\ud800", "#", '"',
]  # fmt: skip


def random_setting(rng: random.Random) -> tuple[str, str, object]:
    """Section, field and value of a preset, mostly of the right kind."""
    flag = rng.choice(FLAGS)
    section, field = flag.section, flag.field
    value: object = flag.default
    if rng.random() < 0.04:
        section = rng.choice(["", "models", "run ", "Run", *JUNK])
    if rng.random() < 0.04:
        field = rng.choice(["", "step", "d-model", field.upper(), *JUNK])
    if rng.random() < 0.12:
        value = rng.choice(VALUES)
    elif flag.rule.choices:
        value = rng.choice(flag.rule.choices)
    elif flag.kind == "bool":
        value = rng.random() < 0.5
    elif flag.kind == "int" and rng.random() < 0.3:
        value = rng.randint(-3, 2000)
    elif flag.kind == "float" and rng.random() < 0.5:
        value = rng.uniform(0.0, 1.0)
    return section, field, value


def random_preset(rng: random.Random, names: list[str]) -> bytes:
    """A JSON preset, perhaps with a fault in its text."""
    document: dict[str, dict[str, object]] = {}
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        section, field, value = random_setting(rng)
        document.setdefault(section, {})[field] = value
    text = json.dumps(document, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.03:
        text = text[: rng.randrange(len(text))]
    elif kind < 0.06:
        text = rng.choice(["", "[]", "null", "NaN", "[" * 5000, '{"a": NaN}', "{'a': 1}", "1e999"])
    elif kind < 0.09:
        text = text.replace("}", rng.choice([",}", "}}", "} # c", "},"]), 1)
    elif kind < 0.12:
        text = '{"run": {"steps": 1, "steps": 2}}'
    data = text.encode(rng.choice(["utf-8"] * 18 + ["utf-8-sig", "utf-16"]), "surrogatepass")
    if data and rng.random() < 0.05:
        position = rng.randrange(len(data))
        data = data[:position] + rng.randbytes(1) + data[position + 1 :]
    return data


class Fuzz:
    """Sends random files through `train_sigma.main` and judges what comes out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.counts = {"refused": 0, "taken": 0}
        self._directory = directory
        self._taken: list[SigmaConfig] = []
        monkeypatch.chdir(directory)
        monkeypatch.setattr(train_sigma, "begin", lambda arguments, config: self._take(config))
        monkeypatch.setattr(train_sigma, "parse_args", self._parse)

    def run(self, make, *, suffix: str, count: int, seed: int) -> None:
        rng = random.Random(seed)
        names = [f"{index}{suffix}" for index in range(8)]
        for index in range(count):
            path = Path(names[index % len(names)])
            path.write_bytes(make(rng, names))
            self._judge(path)

    def _judge(self, path: Path) -> None:
        before = sorted(os.listdir())
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = train_sigma.main([f"@{path}"])
        assert sorted(os.listdir()) == before, "something was written"
        if code == 0:
            self.counts["taken"] += 1
            assert not err.getvalue() and not out.getvalue()
            self._check_identity(self._taken.pop(), path.suffix)
            return
        self.counts["refused"] += 1
        assert code == 2 and not out.getvalue()
        assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1
        assert min(err.getvalue()[:-1]) >= " ", "a control character reaches the terminal"

    def _check_identity(self, config: SigmaConfig, suffix: str) -> None:
        if suffix == ".json":
            assert repr(from_json(to_json(config))) == repr(config)
            return
        again = Path("again")
        again.write_text(to_args(config), encoding="utf-8", newline="")
        assert repr(parse_args(["@again"])) == repr(config)
        again.unlink()

    def _take(self, config: SigmaConfig) -> int:
        self._taken.append(config)
        return 0

    @staticmethod
    def _parse(arguments: list[str]) -> SigmaConfig:
        # `main` would also forgive other errors, with a line that names no flag.
        try:
            return parse_args(arguments)
        except ConfigError as error:
            assert str(error) and not set("\n\r") & set(str(error))
            raise
        except (ValueError, RuntimeError, OSError) as error:
            raise AssertionError("no ConfigError") from error


@pytest.fixture
def fuzz(monkeypatch, tmp_path):
    """Files in memory where there is such a place: opening them anew costs milliseconds on disk."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    with tempfile.TemporaryDirectory(dir=memory if usable else tmp_path) as directory:
        yield Fuzz(monkeypatch, Path(directory))
        monkeypatch.chdir(tmp_path)


def test_random_args_files_are_refused_in_one_line_or_round_trip(fuzz):
    fuzz.run(random_file, suffix=".txt", count=NUM_ARGS_FILES, seed=21)
    # Both sides must really be exercised.
    assert min(fuzz.counts.values()) > NUM_ARGS_FILES // 10, fuzz.counts


def test_random_presets_are_refused_in_one_line_or_round_trip(fuzz):
    fuzz.run(random_preset, suffix=".json", count=NUM_PRESETS, seed=22)
    assert min(fuzz.counts.values()) > NUM_PRESETS // 10, fuzz.counts


def test_a_writer_that_does_not_quote_is_caught(fuzz, monkeypatch):
    monkeypatch.setattr("training.config.cli.encode_value", lambda value: value)
    with pytest.raises((AssertionError, ConfigError)):
        fuzz.run(random_file, suffix=".txt", count=4000, seed=21)


def test_a_reader_with_a_bug_is_caught(fuzz, monkeypatch):
    monkeypatch.setattr("training.config.fields.Flag.check", lambda flag, value: value)
    with pytest.raises(Exception):  # noqa: B017  whatever a value of a wrong kind does
        fuzz.run(random_preset, suffix=".json", count=4000, seed=22)


def test_a_refusal_that_writes_or_says_two_lines_is_caught(fuzz, monkeypatch):
    real = train_sigma.refuse
    monkeypatch.setattr(train_sigma, "refuse", lambda message: Path("log").touch() or real(message))
    with pytest.raises(AssertionError, match="something was written"):
        fuzz.run(random_file, suffix=".txt", count=40, seed=21)
    monkeypatch.setattr(train_sigma, "refuse", lambda message: real(message) + real(message) - 2)
    with pytest.raises(AssertionError):
        fuzz.run(random_file, suffix=".txt", count=40, seed=21)
