"""Looking on from beside: what is shown is what the files say, and the files stay as they are."""

from __future__ import annotations

import errno
import io
import json
import re
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import train_sigma
from tests.training.small_run import small_flags
from training.config.cli import parse_args
from training.config.sigma_config import ConfigError
from training.modes import watch
from training.modes.watch import Follower, Watch
from training.runtime.ui import RunConsole

BEGIN = datetime(2026, 11, 22, 8, tzinfo=UTC).timestamp()


def row(step: int, seconds: float, **more: Any) -> dict[str, Any]:
    at = datetime.fromtimestamp(BEGIN + seconds, UTC).isoformat(timespec="milliseconds")
    return {"step": step, "time_utc": at, "train_loss": 5.0 - step / 100, **more}


def append(path: Path, *rows: dict[str, Any], torn: str = "") -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)
        file.write(torn)


class Stage:
    """A directory of a run of 40 steps, a clock, and a terminal that is written to a string."""

    def __init__(self, directory: Path, *, height: int = 40) -> None:
        (directory / "config.json").write_text('{"run": {"steps": 40}}', encoding="utf-8")
        self.rows, self.samples = directory / "metrics.jsonl", directory / "samples.jsonl"
        append(self.rows, {"step": 0, "time_utc": row(0, 0)["time_utc"], "parameters_total": 7})
        self.seconds = BEGIN
        self.screen = io.StringIO()
        console = RunConsole(
            file=self.screen, force_terminal=True, width=100, height=height, highlight=False,
            markup=False, emoji=False,
        )  # fmt: skip
        self.watch = Watch(directory, console=console, clock=lambda: self.seconds)

    def shown(self) -> str:
        """What the panel says now."""
        console = RunConsole(file=io.StringIO(), width=100, height=40)
        console.print(self.watch.display._panel())
        return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    built = Stage(tmp_path)
    yield built
    built.watch.display.close()


def test_rows_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    follower = Follower(path)
    assert list(follower.read()) == []
    append(path, {"a": 1}, torn='{"a"')
    assert list(follower.read()) == [{"a": 1}]
    append(path, torn=': 2}\nno json\n[1]\n{"a": 3}\n')
    assert list(follower.read()) == [{"a": 2}, {"a": 3}]
    assert list(follower.read()) == []


def test_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    """As when a resumed run takes steps back."""
    path = tmp_path / "rows"
    follower = Follower(path)
    append(path, {"a": 1}, {"a": 2})
    assert len(list(follower.read())) == 2
    path.write_text('{"a": 1}\n', encoding="utf-8")
    assert list(follower.read()) == [{"a": 1}]


def test_the_time_left_comes_from_the_times_of_the_rows(stage: Stage) -> None:
    """Read all at once, a minute after the last of them was written."""
    append(stage.rows, *(row(step, 2.0 * step) for step in range(1, 21)))
    append(stage.samples, {"step": 20, "text": "In the beginning"})
    stage.seconds = BEGIN + 40 + 10
    stage.watch.take()
    text = stage.shown()
    assert "step 20 of 40" in text and "50.0%, 30 s left" in text
    assert "4.8000 nats per token" in text and "In the beginning" in text
    assert "Ctrl+C ends the watching, not the run" in text
    assert not stage.watch.is_done


def test_a_long_silence_is_told_once(stage: Stage) -> None:
    append(stage.rows, row(1, 10), row(2, 20))
    for seconds, told in ((60, 0), (119, 0), (121, 1), (500, 1)):
        stage.seconds = BEGIN + seconds
        stage.watch.take()
        assert stage.screen.getvalue().count("no row for") == told
    append(stage.rows, row(3, 505))
    for seconds, told in ((506, 1), (506 + 20 * 485, 2)):
        stage.seconds = BEGIN + seconds
        stage.watch.take()
        assert stage.screen.getvalue().count("no row for") == told


def test_a_clock_that_is_set_otherwise_makes_no_silence(stage: Stage) -> None:
    """The directory may lie on another machine, whose clock is a quarter of an hour late."""
    for step in range(1, 20):
        append(stage.rows, row(step, step))
        stage.seconds = BEGIN + 900 + step
        stage.watch.take()
    assert stage.screen.getvalue().count("no row for") == 1  # what is there at first may be old
    stage.seconds += 61
    stage.watch.take()
    assert "no row for 1 min 1 s" in stage.screen.getvalue()


def test_a_disk_that_is_away_for_a_moment_does_not_end_the_watching(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    coming = [row(step, float(step)) for step in (1, 2, 40)]
    append(stage.rows, coming.pop(0))
    opened, away = Path.open, [False]

    def open_if_there(path: Path, *arguments: Any, **more: Any) -> Any:
        if away[0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(path, *arguments, **more)

    def sleep(seconds: float) -> None:
        away[0] = not away[0]
        if not away[0]:
            append(stage.rows, coming.pop(0))

    monkeypatch.setattr(Path, "open", open_if_there)
    assert watch.follow(stage.watch, sleep=sleep) == 0
    assert coming == [] and stage.watch.is_done
    away[0] = True
    with pytest.raises(OSError, match="Stale"):  # one that is never there is an error
        watch.follow(stage.watch, sleep=sleep)


def test_rows_of_a_long_run_are_not_all_held(tmp_path: Path) -> None:
    """A hundred columns a row: as objects they take ten times what the file does."""
    more = {f"column_{number}": number + 0.5 for number in range(100)}
    append(tmp_path / "metrics.jsonl", *(row(step, step, **more) for step in range(3000)))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    try:
        assert watch.tell_newest(tmp_path, as_json=True) == 0
        watched = Watch(tmp_path, console=RunConsole(file=io.StringIO()))
        watched.take()
        watched.display.close()
        assert tracemalloc.get_traced_memory()[1] < size / 2
    finally:
        tracemalloc.stop()


def test_it_follows_to_the_last_step(stage: Stage) -> None:
    coming = [row(step, float(step)) for step in range(1, 41)]

    def sleep(seconds: float) -> None:
        append(stage.rows, coming.pop(0))
        stage.seconds += 1

    assert watch.follow(stage.watch, sleep=sleep) == 0
    assert coming == [] and stage.watch.is_done
    assert "step 40 of 40" in stage.shown() and not stage.watch.display.is_live


def test_ctrl_c_ends_the_watching(stage: Stage) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    assert watch.follow(stage.watch, sleep=sleep) == 0
    assert not stage.watch.display.is_live


def test_a_run_is_told_without_a_terminal_and_nothing_is_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_sigma.main(small_flags(tmp_path / "run", "--steps", "2")) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    flags = ["--mode", "watch", "--output-dir", str(tmp_path / "run")]
    assert train_sigma.main(flags) == 0
    assert re.fullmatch(r"step 2/2  loss \d\.\d{4}  .*\n", capsys.readouterr().out)
    assert train_sigma.main([*flags, "--json"]) == 0
    newest = json.loads(capsys.readouterr().out)
    assert newest["step"] == 2 and newest["train_loss"] > 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        watch.run(parse_args(["--mode", "watch", "--output-dir", str(tmp_path)]))


def test_a_run_that_has_just_begun_has_nothing_to_tell(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.watch.take()
    assert "step 0 of 40" in stage.shown()
    stage.watch.display.close()
    assert watch.tell_newest(tmp_path, as_json=True) == 0
    assert capsys.readouterr().out == "{}\n"
    assert watch.tell_newest(tmp_path, as_json=False) == 0
    assert capsys.readouterr().out == "no step is done yet\n"
