"""A planted change is found with its sign, an equal one is not; the report lies where it must."""

import json

import pytest

from scripts.bottleneck_fix import FILE_NAME, main, summarize
from tests.integration.runs import tiny_flags


def rows(step, *, drift=0.0, count=20):
    return [
        {
            "step": (value := step * (1.0 + drift * i + 0.01 * (i % 3))),
            "phase_forward_s": value / 4,
            "phase_backward_s": value / 2,
            "phase_opt_step_s": 0.0,
        }
        for i in range(count)
    ]


def test_a_machine_that_slows_down_changes_no_ratio():
    times = {"before": rows(1.0, drift=0.2), "after": rows(0.5, drift=0.2)}
    report = summarize(
        times | {"placebo": rows(1.0, drift=0.2)}, tokens={"before": 100, "after": 200}
    )
    assert report["steps_measured"] == 10
    for part in ("step", "forward", "backward"):
        assert report["after_over_before"][part] == {"median": 0.5, "low": 0.5, "high": 0.5}
        assert report["placebo_over_before"][part]["median"] == 1.0
    assert "optimizer" not in report["after_over_before"]  # nothing was measured
    tail = report["tail"]
    assert tail["after"]["tokens_per_s"] == pytest.approx(4 * tail["before"]["tokens_per_s"])
    assert tail["placebo"] == tail["before"]


def test_four_times_the_rows_take_longer_and_the_report_says_so(tmp_path, capsys):
    flags = [*tiny_flags(tmp_path), "--measure-steps", "8", "--clock", "cpu"]
    assert main([*flags, "--fix", "--batch-size 64"]) == 0
    report = json.loads((tmp_path / "perf" / FILE_NAME).read_text(encoding="utf-8"))
    assert report["fix"] == ["--batch-size", "64"] and report["steps_measured"] == 4
    assert report["after_over_before"]["step"]["median"] > 1.0
    assert report["tail"]["after"]["forward_s"] > 0.0
    assert str(tmp_path / "perf" / FILE_NAME) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--measure-steps", "2"], "at least 8"), (["--fix", "--batch-size 0"], "--batch-size")],
)
def test_a_mistake_is_named_before_anything_runs(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*tiny_flags(tmp_path), "--fix", "--lr 0.1", *given])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "perf").exists()
