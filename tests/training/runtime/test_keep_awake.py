"""The machine is asked to stay awake for exactly as long as a run lasts."""

from __future__ import annotations

import sys

import pytest

import train_sigma
from tests.training.runtime.fake_console import FakeConsole
from training.runtime.keep_awake import KeepAwake


def test_the_request_is_made_and_taken_back_also_after_a_failure():
    fake = FakeConsole()
    with pytest.raises(RuntimeError):
        with KeepAwake(kernel32=fake) as awake:
            assert awake.held and fake.states == [0x80000001]
            raise RuntimeError("the run failed")
    assert fake.states == [0x80000001, 0x80000000] and not awake.held


def test_a_refusal_is_told_and_nothing_is_taken_back(capsys):
    fake = FakeConsole(agrees=False)
    with KeepAwake(kernel32=fake) as awake:
        assert not awake.held
    assert len(fake.states) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "may suspend" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="Windows is asked there")
def test_other_systems_are_not_asked(capsys):
    with KeepAwake() as awake:
        assert not awake.held
    assert capsys.readouterr().err == ""


def test_training_asks_for_it(monkeypatch, tmp_path):
    fake, seen = FakeConsole(), []

    class Trainer:
        def fit(self) -> None:
            seen.extend(fake.states)

    monkeypatch.setattr("training.build.build_trainer", lambda config: Trainer())
    monkeypatch.setattr("training.runtime.keep_awake.windows_kernel", lambda: fake)
    monkeypatch.chdir(tmp_path)
    config = train_sigma.parse_args(["--no-require-cuda", "--device", "cpu"])
    assert train_sigma.train(config) == 0
    assert seen == [0x80000001] and fake.states[-1] == 0x80000000
