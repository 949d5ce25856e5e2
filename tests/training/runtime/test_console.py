"""Whose window it is, when it stays open, and how a line is awaited; Windows played by a fake."""

from __future__ import annotations

import io
import os
import sys

import pytest

from tests.training.runtime.fake_console import FakeConsole
from training.runtime import console
from training.runtime.console import ConsoleClose, HeldWindow, owns_console, read_line

PYTHON = r"C:\Program Files\Python313\python.exe"
PY = r"C:\Windows\py.exe"
CMD = r"C:\Windows\System32\cmd.exe"


@pytest.mark.parametrize(
    ("images", "frozen", "owns"),
    [
        ([PYTHON], False, True),
        ([PYTHON, PY], False, True),
        ([PYTHON, CMD], False, False),
        ([PYTHON, PY, CMD], False, False),
        ([PYTHON, r"C:\tools\PowerShell.exe"], False, False),
        ([r"C:\sigma\eco_train.exe"], True, True),
        ([r"C:\sigma\eco_train.exe", PYTHON], True, False),
        ([r"C:\sigma\eco_train.exe", CMD], True, False),
        ([], True, False),
        ([PYTHON] * 65, False, False),
    ],
)
def test_a_window_is_ours_when_no_shell_shares_it(images, frozen, owns, monkeypatch):
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    fake = FakeConsole(dict(enumerate(images, start=10)))
    assert owns_console(fake) is owns
    assert not fake.open_handles


def test_a_process_that_may_not_be_asked_counts_as_a_shell():
    assert not owns_console(FakeConsole({1: PYTHON, 2: PYTHON}, agrees=False))
    assert not owns_console(None)


@pytest.fixture
def person(monkeypatch):
    """A person at the program's own window; counts how often Enter was awaited."""
    asked: list[str] = []
    monkeypatch.setattr(console, "is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "")
    return asked


def hold(exit_code: int = 0, *, error: BaseException | None = None, fake=None) -> int:
    with HeldWindow(kernel32=fake or FakeConsole({1: PYTHON})) as window:
        window.exit_code = exit_code
        if error is not None:
            raise error
    return window.exit_code


@pytest.mark.parametrize("code", [1, 2])
def test_the_programs_own_window_stays_open_after_a_failure(code, person):
    assert hold(code) == code
    assert person == ["Press Enter to close this window. "]


def test_a_bug_is_shown_before_the_window_waits(person, capsys):
    assert hold(error=TypeError("a bug")) == 1
    assert len(person) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "TypeError: a bug" in shown


@pytest.mark.parametrize("code", [0, 130])
def test_it_closes_after_success_and_after_ctrl_c(code, person):
    assert hold(code) == code
    assert person == []


def test_a_shells_window_is_left_alone(person, capsys):
    shell = FakeConsole({1: PYTHON, 2: CMD})
    assert hold(2, fake=shell) == 2
    with pytest.raises(TypeError):
        hold(error=TypeError("a bug"), fake=shell)
    assert person == [] and capsys.readouterr().err == ""


def test_help_and_ctrl_c_pass_through(person):
    for error in (SystemExit(0), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            hold(error=error)
    assert person == []


def test_nobody_is_waited_for_without_a_person(person, monkeypatch):
    monkeypatch.setattr(console, "is_interactive", lambda: False)
    assert hold(1) == 1
    assert person == []


@pytest.mark.parametrize("ending", [EOFError, KeyboardInterrupt])
def test_a_window_that_cannot_be_read_does_not_fail_again(ending, person, monkeypatch):
    def refuse(prompt=""):
        raise ending

    monkeypatch.setattr("builtins.input", refuse)
    assert hold(2) == 2


def test_without_a_console_closing_is_not_watched():
    fake = FakeConsole(agrees=False)
    with ConsoleClose(lambda: None, kernel32=fake):
        assert fake.handlers == []


@pytest.fixture
def typed(monkeypatch):
    """A pipe in the place of the keyboard; returns its writing end."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8") as stdin, open(writing, "wb", buffering=0) as keyboard:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield keyboard


@pytest.mark.skipif(sys.platform == "win32", reason="a Windows console is no pipe")
def test_a_line_is_awaited_for_a_while_and_its_end_is_told(typed):
    assert read_line(0.0) is None
    typed.write("zwei ä\r\n".encode())
    assert read_line(60.0) == "zwei ä"
    typed.close()
    with pytest.raises(EOFError):
        read_line(60.0)


def test_a_line_may_be_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    assert read_line(None) == "q"
    with pytest.raises(EOFError):
        read_line(None)
