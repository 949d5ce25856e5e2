"""metrics.jsonl holds each step once, whatever tore its last row off."""

import json
import math

import pytest

from training.runtime.metrics import MetricsLog, write_status

ROWS = [{"step": step, "loss": 1.5 / (step + 1), "text": "Größe"} for step in range(4)]


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    log = MetricsLog(path)
    for row in rows:
        log.append(row)
    log.close()


def test_every_truncation_of_the_last_row_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for cut in range(start, len(whole) - 1):
        path.write_bytes(whole[:cut])
        write(path, ROWS[3:])
        assert written(path) == ROWS


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"step": 4, "te\xc3', b'{"step"', b"\xff\xfe"])
def test_foreign_tails_are_cut(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, ROWS)
    path.write_bytes(path.read_bytes() + tail)
    write(path, [{"step": 4}])
    assert written(path) == [*ROWS, {"step": 4}]


def test_values_json_cannot_say_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"a": math.nan, "b": math.inf, "c": 1.0}])
    assert written(path) == [{"a": None, "b": None, "c": 1.0}]


def test_resume_cuts_at_the_checkpoint_and_keeps_the_tail(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for row in ROWS[:2]:
        log.append(row)
    offset = log.offset
    for row in ROWS[2:]:
        log.append(row)
    log.resume(offset)
    log.append(ROWS[2])
    log.close()
    assert written(path) == ROWS[:3]
    assert written(tmp_path / "metrics.orphan-1.jsonl") == ROWS[2:]


def test_status_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "status_latest.json"
    write_status(path, ROWS[0])
    write_status(path, ROWS[1])
    assert json.loads(path.read_text(encoding="utf-8")) == ROWS[1]
    assert [p.name for p in tmp_path.iterdir()] == ["status_latest.json"]
