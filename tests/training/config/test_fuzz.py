"""R21 in small: 2,000 random args files are refused in one line or round-trip exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import train_sigma
from training.config.cli import parse_args, to_args
from training.config.fields import ConfigError, iter_flags
from training.config.sigma_config import SigmaConfig

NUM_FILES = 2000
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


def test_random_args_files_are_refused_in_one_line_or_round_trip(
    tmp_path: Path, monkeypatch, capsys
):
    rng = random.Random(21)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_sigma, "dispatch", lambda config: pytest.fail("a run was started"))
    names = [f"{index}.txt" for index in range(8)]
    counts = {"refused": 0, "taken": 0}
    for index in range(NUM_FILES):
        path = tmp_path / names[index % len(names)]
        path.write_bytes(random_file(rng, names))
        before = sorted(item.name for item in tmp_path.iterdir())
        try:
            config = parse_args([f"@{path.name}"])
        except ConfigError as error:
            counts["refused"] += 1
            assert str(error) and "\n" not in str(error) and "\r" not in str(error)
            assert train_sigma.main([f"@{path.name}"]) == 2
            shown = capsys.readouterr()
            assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
            assert not shown.out
            assert sorted(item.name for item in tmp_path.iterdir()) == before
        else:
            counts["taken"] += 1
            (tmp_path / "again").write_text(to_args(config), encoding="utf-8", newline="")
            again = parse_args(["@again"])
            assert repr(again) == repr(config)
            (tmp_path / "again").unlink()
    # Both sides must really be exercised.
    assert min(counts.values()) > NUM_FILES // 10, counts
