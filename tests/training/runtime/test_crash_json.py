"""Suite R12: every kind of failure leaves a valid crash JSON, and no secret reaches it."""

from __future__ import annotations

import json
import random
import string
import sys
import urllib.parse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.runtime.crash_report import CRASH_SCHEMA, write_crash_report
from training.runtime.redact import Redactor

SECRETS = 1000
TYPES = {"string": str, "integer": int, "object": dict, "array": list}


def schema_errors(value: Any, schema: dict[str, Any], where: str = "report") -> list[str]:
    """The parts of JSON Schema that CRASH_SCHEMA uses."""
    kind = TYPES[schema["type"]]
    if not isinstance(value, kind) or isinstance(value, bool):
        return [f"{where} is not a {schema['type']}"]
    errors = []
    if "items" in schema:
        for index, item in enumerate(value):
            errors += schema_errors(item, schema["items"], f"{where}[{index}]")
    if "properties" in schema:
        errors += [f"{where}.{name} is missing" for name in schema["required"] if name not in value]
        for name, item in value.items():
            if name not in schema["properties"]:
                errors.append(f"{where}.{name} is unknown")
            else:
                errors += schema_errors(item, schema["properties"][name], f"{where}.{name}")
    return errors


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def report(directory: Path, error: BaseException, **changes: Any) -> dict[str, Any]:
    """Write a report and read it back strictly."""
    arguments: dict[str, Any] = {
        "step": 7,
        "last_metrics": {"loss": 1.5},
        "feature_state": {},
        "config_hash": "abc",
    }
    path = write_crash_report(directory, error=error, **(arguments | changes))
    assert path is not None and path.parent == directory / "errors"
    assert path.name.startswith("crash_step_00000007_")
    content = json.loads(path.read_bytes().decode("ascii"), parse_constant=refuse)
    assert schema_errors(content, CRASH_SCHEMA) == []
    assert path.stat().st_size < 2_000_000
    return content


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Exiting(Exception):
    def __str__(self) -> str:
        raise SystemExit(0)


class NotText(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


class HostileStr(str):
    def __str__(self) -> str:
        raise ValueError("no")

    def __len__(self) -> int:
        return -1


def nested(depth: int) -> RecursionError | None:
    try:
        nested(depth + 1)
    except RecursionError as error:
        if depth == 0:
            return error
        raise
    return None


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def chained(count: int) -> BaseException:
    error: BaseException = ValueError("first")
    for number in range(count):
        follower = RuntimeError(f"number {number}")
        follower.__cause__, error = error, follower
    return error


def cyclic() -> BaseException:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    return first


def with_field(error: BaseException, name: str, value: Any) -> BaseException:
    setattr(error, name, value)
    return error


def noted(note: Any) -> BaseException:
    error = ValueError("noted")
    error.__notes__ = note
    return error


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def shape_mismatch() -> BaseException:
    try:
        torch.ones(2, 3) @ torch.ones(2, 3)
    except RuntimeError as error:
        return error
    raise AssertionError


KINDS: dict[str, Any] = {
    "plain": lambda: ValueError("plain"),
    "no message": lambda: RuntimeError(),
    "many arguments": lambda: RuntimeError("a", 2, [3], {"b": 4}),
    "bytes": lambda: ValueError(b"\xff\x00"),
    "surrogate": lambda: ValueError("\ud800 \udfff"),
    "controls": lambda: ValueError("\x00\x1b[31m\x85\u2028"),
    "huge": lambda: RuntimeError("x" * 10**7),
    "huge line count": lambda: RuntimeError("line\n" * 10**6),
    "unprintable": Unprintable,
    "exits when printed": Exiting,
    "str that is no text": NotText,
    "hostile str": lambda: ValueError(HostileStr("text")),
    "hostile name": lambda: type("Odd\n", (Exception,), {})("x"),
    "key": lambda: KeyError(("tuple", None)),
    "keyboard": KeyboardInterrupt,
    "exit": lambda: SystemExit(3),
    "generator exit": GeneratorExit,
    "stop iteration": lambda: StopIteration(object()),
    "memory": MemoryError,
    "recursion": lambda: nested(0),
    "cyclic cause": cyclic,
    "cyclic self": lambda: with_field(ValueError("a"), "x", [..., None]),
    "long chain": lambda: chained(3000),
    "group": lambda: ExceptionGroup("g", [ValueError("a"), ExceptionGroup("h", [OSError(5, "e")])]),
    "wide group": lambda: ExceptionGroup("g", [ValueError(str(n)) for n in range(5000)]),
    "base group": lambda: BaseExceptionGroup("g", [KeyboardInterrupt()]),
    "os error": lambda: OSError(28, "No space left on device", "/a/b"),
    "connection": lambda: ConnectionResetError(104, "reset"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff" * 100, 0, 1, "bad"),
    "syntax": lambda: SyntaxError("bad", ("f.py", 1, 2, "x = = 1")),
    "odd syntax": lambda: with_field(SyntaxError("bad"), "text", 5),
    "odd lines": lambda: with_field(SyntaxError("bad"), "lineno", object()),
    "import": lambda: ImportError("no module", name="x", path="/y"),
    "attribute": lambda: AttributeError("no", name="shpe", obj=torch.ones(2)),
    "name": lambda: NameError("name 'x' is not defined", name="x"),
    "notes": lambda: noted(["one", "\ud800", 5]),
    "odd notes": lambda: noted(7),
    "warning": lambda: UserWarning("as an error"),
    "assertion": lambda: AssertionError({"a": np.ones(3)}),
    "arithmetic": lambda: ZeroDivisionError("division by zero"),
    "gpu memory": out_of_memory,
    "tensor shapes": shape_mismatch,
    "timeout": lambda: TimeoutError("worker 3"),
    "not implemented": lambda: NotImplementedError("op"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_a_valid_report(ram_path: Path, kind: str) -> None:
    error = raised(KINDS[kind]())
    content = report(ram_path, error)
    assert content["error"]["traceback"]
    assert content["error"]["type"].endswith(type(error).__qualname__)


def test_at_least_forty_kinds_are_tried() -> None:
    assert len(KINDS) >= 40


def test_the_report_says_what_a_reader_needs(ram_path: Path) -> None:
    def inner() -> None:
        raise ValueError("the message") from KeyError("the cause")

    try:
        inner()
    except ValueError as error:
        content = report(ram_path, error, last_metrics={"loss": float("nan"), "lr": 0.1})
    assert content["error"]["type"] == "builtins.ValueError"
    assert content["error"]["message"] == "ValueError: the message"
    text = "\n".join(content["error"]["traceback"])
    assert "in inner" in text and "KeyError: 'the cause'" in text
    assert content["last_metrics"] == {"loss": "nan", "lr": 0.1}
    assert content["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert content["memory"]["rss_bytes"] > 10**6
    assert content["step"] == 7 and content["config_hash"] == "abc"


def test_hostile_state_is_named_and_not_asked(ram_path: Path) -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise SystemExit(1)

        __str__ = __float__ = __iter__ = __len__ = __repr__

    class HostileDict(dict):
        def items(self) -> Any:
            raise RuntimeError

    loop: list[Any] = []
    loop.append(loop)
    state = {
        "object": Hostile(),
        "dict": HostileDict(a=1),
        "loop": loop,
        "tensor": torch.ones(2, 3),
        "array": np.ones(4),
        "scalar": np.float32(0.5),
        "ordered": OrderedDict(b=True),
        "big": 10**5000,
        "inf": float("-inf"),
        "wide": list(range(10**5)),
        "deep": json.loads("[" * 400 + "]" * 400),
        5: None,
        None: "none",
        (1, 2): "tuple",
        Hostile: "type",
        "set": {1},
        "bytes": b"x",
    }
    content = report(ram_path, ValueError("x"), feature_state=state)["feature_state"]
    assert content["object"].startswith("<") and "Hostile" in content["object"]
    assert content["dict"] == {"a": 1}
    assert "torch.float32 (2, 3)" in content["tensor"]
    assert content["scalar"] == 0.5 and content["inf"] == "-inf"
    assert "bits" in content["big"]


def test_a_directory_that_cannot_be_written_gives_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = write_crash_report(
        tmp_path / "file",
        step=1,
        error=ValueError("x"),
        last_metrics={},
        feature_state={},
        config_hash="",
    )
    assert path is None
    assert "no crash report could be written" in capsys.readouterr().err


def random_text(rng: random.Random, count: int, alphabet: str = "") -> str:
    return "".join(rng.choices(alphabet or string.ascii_letters + string.digits, k=count))


def make_secret(rng: random.Random) -> tuple[str, str]:
    """(kind, secret) of a random kind; "env" and "named" have no shape of their own."""
    upper = string.ascii_uppercase + string.digits
    makers = {
        "hf": lambda: "hf_" + random_text(rng, 34),
        "openai": lambda: "sk-proj-" + random_text(rng, 40),
        "old openai": lambda: "sk-" + random_text(rng, 48),
        "anthropic": lambda: "sk-ant-api03-" + random_text(rng, 60) + "-_AA",
        "github": lambda: "gh" + rng.choice("pousr") + "_" + random_text(rng, 36),
        "github pat": lambda: "github_pat_" + random_text(rng, 22) + "_" + random_text(rng, 59),
        "gitlab": lambda: "glpat-" + random_text(rng, 20),
        "aws": lambda: rng.choice(["AKIA", "ASIA"]) + random_text(rng, 16, upper),
        "google": lambda: "AIza" + random_text(rng, 35),
        "slack": lambda: "xoxb-" + random_text(rng, 12, string.digits) + "-" + random_text(rng, 24),
        "jwt": lambda: "eyJ" + ".".join(random_text(rng, n) for n in (17, 40, 43)),
        "env": lambda: random_text(rng, rng.randrange(6, 50), string.ascii_letters + "+/=!$%\"'\\"),
        "named": lambda: random_text(rng, rng.randrange(6, 40)),
        "login": lambda: random_text(rng, rng.randrange(6, 30)),
    }
    kind = rng.choice(list(makers))
    return kind, makers[kind]()


def plant(kind: str, secret: str, rng: random.Random) -> str:
    """Text as it appears in real messages, with the secret in it."""
    if kind == "named":
        name = rng.choice(["password", "api_key", "HF_TOKEN", "client_secret", "access_key"])
        form = rng.choice(["{n}={s}", "{n}: {s}", "'{n}': '{s}'", '"{n}": "{s}"', "--{n} {s}"])
        return form.format(n=name, s=secret) + rng.choice(["", " failed", "\nnext"])
    if kind == "login":
        return rng.choice(
            [f"https://user:{secret}@host/x", f"Bearer {secret}", f"postgres://a:{secret}@db:5432/"]
        )
    if kind == "env":
        quoted = urllib.parse.quote(secret, safe="")
        return rng.choice([secret, repr(secret), json.dumps(secret), f"https://h/?q={quoted}"])
    return rng.choice(
        [f"401 for {secret}", f"key={secret}&x=1", f"Authorization: Bearer {secret}", f"({secret})"]
    )


def test_a_thousand_planted_secrets_are_not_in_the_report(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each planted in a random place: message, cause, note, metrics, feature state, argv."""
    rng, leaked, kinds = random.Random(0), [], set()
    names = ("HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_SECRET")
    for _ in range(SECRETS):
        kind, secret = make_secret(rng)
        kinds.add(kind)
        variable = rng.choice(names)
        if kind == "env":
            monkeypatch.setenv(variable, secret)
        text = plant(kind, secret, rng)
        place, error = rng.randrange(6), ValueError("x")
        metrics: dict[str, Any] = {}
        features: dict[str, Any] = {}
        if place == 0:
            error = ValueError(text)
        elif place == 1:
            error.__cause__ = RuntimeError(f"{'long ' * rng.randrange(20000)}{text}")
        elif place == 2:
            error.add_note(text)
        elif place == 3:
            metrics = {"note": [text], text: 1}
        elif place == 4:
            features = {"deep": {"er": ({"password": secret}, text)}}
        else:
            monkeypatch.setattr(sys, "argv", ["train", "--api-key", secret, f"--t={text}"])
        content = report(ram_path, raised(error), last_metrics=metrics, feature_state=features)
        flat = json.dumps(content, ensure_ascii=False)
        forms = {secret, json.dumps(secret)[1:-1], json.dumps(json.dumps(secret))[3:-3]}
        if any(form in flat for form in forms if len(form) >= 6):
            leaked.append((kind, place, text))
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(sys, "argv", ["train"])
    assert leaked == []
    assert len(kinds) == 14


def test_the_search_for_leaks_sees_a_leak(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the redactor switched off the same secrets are found."""
    monkeypatch.setattr(Redactor, "clean", lambda self, text: text)
    content = report(ram_path, ValueError("401 for hf_abcdefgh12345678"))
    assert "hf_abcdefgh12345678" in json.dumps(content)


def test_a_secret_across_the_cut_of_a_long_message_is_dropped(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "correct-horse-battery-staple-0123456789"
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    for size in range(63_000, 67_000, 97):
        content = report(ram_path, ValueError((secret * 4000)[:size] + secret * 3000))
        flat = json.dumps(content)
        assert not any(secret[i : i + 12] in flat for i in range(len(secret) - 12))
