"""The journal: written before the trial, completed after it, told once over all lives of a run."""

import errno
import itertools
import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from research.journal import EVENTS_NAME, Journal, Outcome, Registration, read_trials


def clock():
    seconds = itertools.count()
    return lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=next(seconds))


def entry(step):
    return Registration(
        step=step,
        title=f"candidate at {step}",
        hypothesis="The loss falls further.",
        metric="Difference of the falls.",
        threshold="E >= 33.",
        design="Two arms.",
    )


def outcome(step, decision="dropped: futile"):
    return Outcome(step=step, result="9 replicates.", interval=(-0.1, 0.2), decision=decision)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "research"


def pages(directory):
    return sorted(path.name for path in directory.glob("RESEARCH_LOG_*.md"))


def test_the_page_stands_before_the_trial_and_its_first_parts_stay(directory):
    journal = Journal(directory, now=clock())
    cycle = journal.register(entry(10))
    assert pages(directory) == ["RESEARCH_LOG_20260102T030405Z_cycle001.md"]
    path = directory / pages(directory)[0]
    before = path.read_text(encoding="utf-8")
    assert "E >= 33." in before and "## Result" not in before
    journal.complete(cycle, outcome(22))
    after = path.read_text(encoding="utf-8")
    assert after.startswith(before.rstrip())
    assert "dropped: futile" in after and "-0.1 to 0.2" in after


def test_nothing_is_written_without_a_trial(directory):
    journal = Journal(directory, now=clock())
    journal.resume(0)
    assert journal.position == 0 and not directory.exists()


def test_a_cycle_is_completed_once_and_only_if_it_was_registered(directory):
    journal = Journal(directory, now=clock())
    cycle = journal.register(entry(1))
    journal.complete(cycle, outcome(2))
    for wrong in (cycle, 7):
        with pytest.raises(ValueError, match=f"cycle {wrong} .* not open"):
            journal.complete(wrong, outcome(3))


def test_a_resumed_life_moves_what_it_will_write_again(directory):
    first = Journal(directory, now=clock())
    cycle = first.register(entry(10))
    position = first.position  # a checkpoint is taken here
    first.complete(cycle, outcome(20))
    first.register(entry(30))
    second = Journal(directory, now=clock())
    second.resume(position)
    open_page = (directory / pages(directory)[0]).read_text(encoding="utf-8")
    assert "## Result" not in open_page
    second.complete(cycle, outcome(20, decision="promoted: all gates"))
    assert second.register(entry(40)) == 2
    told = read_trials(directory)
    assert [trial["step"] for trial in told] == [10, 40]
    assert told[0]["outcome"]["decision"] == "promoted: all gates" and told[1]["outcome"] is None
    orphans = (directory / "journal.orphan-1.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in orphans] == ["completed", "registered"]
    assert sum("orphan" in name for name in pages(directory)) == 1


def test_a_new_run_in_an_old_directory_begins_at_the_first_cycle(directory):
    old = Journal(directory, now=clock())
    old.complete(old.register(entry(10)), outcome(20))
    new = Journal(directory, now=clock())
    assert new.register(entry(5)) == 1
    assert [trial["step"] for trial in read_trials(directory)] == [5]
    assert sum("orphan" in name for name in pages(directory)) == 1


def test_torn_and_foreign_lines_are_passed_over(directory):
    journal = Journal(directory, now=clock())
    journal.register(entry(10))
    with (directory / EVENTS_NAME).open("a", encoding="utf-8") as file:
        file.write('[1]\n{"event": "completed", "cycle": 1}\n{"event": "other"}\n{"event": "comp')
    assert [trial["outcome"] for trial in read_trials(directory)] == [None]
    assert read_trials(directory / "missing") == []


@pytest.mark.parametrize("kept", range(5))
def test_any_position_can_be_gone_back_to(directory, kept):
    journal = Journal(directory, now=clock())
    for step in (1, 2):
        journal.complete(journal.register(entry(step)), outcome(step))
    again = Journal(directory, now=clock())
    again.resume(kept)
    lines = (directory / EVENTS_NAME).read_bytes().splitlines()
    assert len(lines) == again.position == kept
    told = read_trials(directory)
    assert len(told) == (kept + 1) // 2
    assert [trial["outcome"] is not None for trial in told] == [True, True][: kept // 2] + [
        False
    ] * (kept % 2)


def refuse(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["research.journal.os.fsync", "research.journal.Journal._write"])
def test_a_registration_that_finds_no_room_leaves_no_trace(directory, monkeypatch, call):
    journal = Journal(directory, now=clock())
    journal.complete(journal.register(entry(1)), outcome(2))
    before = (directory / EVENTS_NAME).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            journal.register(entry(3))
    assert (directory / EVENTS_NAME).read_bytes() == before and journal.position == 2
    assert journal.register(entry(5)) == 2
    assert [trial["step"] for trial in read_trials(directory)] == [1, 5]


@pytest.mark.parametrize("later", ["settle", "register"])
@pytest.mark.parametrize("call", ["research.journal.os.fsync", "research.journal.Journal._write"])
def test_an_outcome_waits_for_room_and_stands_before_the_next_trial(
    directory, monkeypatch, caplog, call, later
):
    journal = Journal(directory, now=clock())
    cycle = journal.register(entry(1))
    with monkeypatch.context() as patch:
        patch.setattr(call, refuse)
        journal.complete(cycle, outcome(2, "promoted: forced"))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            journal.register(entry(3))
    assert "an outcome waits" in caplog.text and journal.position == 1
    assert read_trials(directory)[0]["outcome"] is None
    journal.settle() if later == "settle" else journal.register(entry(4))
    assert read_trials(directory)[0]["outcome"]["decision"] == "promoted: forced"
    assert "promoted: forced" in (directory / pages(directory)[0]).read_text(encoding="utf-8")
    events = [json.loads(line)["event"] for line in (directory / EVENTS_NAME).open("rb")]
    assert events == ["registered", "completed", "registered"][: journal.position]


def test_what_follows_a_line_torn_by_a_kill_is_read(directory):
    journal = Journal(directory, now=clock())
    journal.complete(journal.register(entry(1)), outcome(2))
    journal.register(entry(3))
    path = directory / EVENTS_NAME
    path.write_bytes(path.read_bytes()[:-20])
    again = Journal(directory, now=clock())
    again.resume(2)
    again.complete(again.register(entry(5)), outcome(6, "promoted: forced"))
    assert [trial["step"] for trial in read_trials(directory)] == [1, 5]
    assert read_trials(directory)[1]["outcome"]["decision"] == "promoted: forced"
