"""A crash report is written for every kind of failure, follows its schema and leaks no secret."""

import json
import random
import string

import pytest

from training.runtime.crash_report import CRASH_SCHEMA, write_crash_report


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no")

    __repr__ = __str__


def cyclic():
    values = {}
    values["self"] = values
    return values


ERRORS = [
    ValueError("plain"),
    RuntimeError("x" * 10**6),
    Unprintable(),
    MemoryError(),
    KeyError("key"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ValueError("\ud800 lone surrogate"),
    ExceptionGroup("several", [ValueError("one"), OSError(28, "disk")]),
    SystemExit(3),
    RecursionError(),
]


def report(directory, error, *, metrics=None, features=None):
    path = write_crash_report(
        directory,
        step=7,
        error=error,
        last_metrics=metrics or {"loss": float("nan"), "step": 7},
        feature_state=features or {},
        config_hash="abc",
    )
    assert path is not None
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_kind_of_failure_leaves_a_valid_report(tmp_path, error):
    try:
        raise error
    except BaseException as caught:
        content = report(tmp_path, caught, features=cyclic())
    assert sorted(content) == CRASH_SCHEMA["required"]
    assert sorted(content["error"]) == ["message", "traceback", "type"]
    assert content["error"]["type"].endswith(type(error).__name__) and content["step"] == 7
    assert len(json.dumps(content)) < 500_000


def test_a_thousand_planted_secrets_stay_out(tmp_path, monkeypatch):
    draw = random.Random(0)

    def secret(prefix):
        return prefix + "".join(draw.choices(string.ascii_letters + string.digits, k=36))

    kinds = ("hf_", "sk-", "ghp_", "AKIA", "value-of-a-variable-")
    leaked = 0
    for batch in range(10):
        planted = [secret(kinds[i % len(kinds)]) for i in range(100)]
        hidden = planted[4::5]
        for number, value in enumerate(hidden):
            monkeypatch.setenv(f"SERVICE{number}_API_KEY", value)
        text = " ".join(f"Authorization: Bearer {value} failed" for value in planted)
        content = report(
            tmp_path / str(batch),
            RuntimeError(text[:7000]),
            metrics={"note": text[7000:], "HF_TOKEN": planted[0]},
            features={"urls": [f"https://user:{value}@host/path" for value in planted]},
        )
        flat = json.dumps(content)
        leaked += sum(value in flat for value in planted)
    assert leaked == 0
