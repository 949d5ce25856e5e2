"""The performance window on a played clock, and in a real run that it must not change."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.integration.runs import differences, tiny_flags, train
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.config.sections import PerfConfig
from training.features import FEATURES
from training.runtime import clock as clock_module
from training.runtime.clock import PhaseClock, bottleneck, phase_columns, stage_seconds
from training.runtime.environment import EnvironmentProblem
from training.runtime.operator_profile import OperatorProfile, times_on_device
from training.runtime.perf_window import PerfWindow

CPU = torch.device("cpu")
SPANS = {"data": 1.0, "forward": 4.0, "backward": 8.0, "opt_step": 2.0, "features": 0.5}
REPORTS = ("baseline_throughput", "window_10m_summary", "window_10m_bottlenecks")


class PlayedTime:
    """A clock that stands still unless it is moved; counts how often the device was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.waits = 0
        played = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(clock_module, "time", played)

    def wait(self, device: torch.device) -> None:
        self.waits += 1


class Played:
    """A window and its clock on played time."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **settings) -> None:
        self.time = PlayedTime(monkeypatch)
        monkeypatch.setattr(clock_module, "synchronize", self.time.wait)
        self.said: list[str] = []
        self.directory = directory
        values = {"perf_warmup_steps": 2, "perf_measure_steps": 5, "perf_profiler_steps": 0}
        self.window = PerfWindow(
            PerfConfig(**(values | settings)),
            directory=directory,
            device=CPU,
            on_device=False,
            tokens_per_step=100,
            config_hash="abc",
            say=self.said.append,
            now=lambda: self.time.now,
        )
        self.clock = PhaseClock(CPU, window=self.window)

    def step(self, factor: float = 1.0, *, gap: float = 0.0, after: float = 0.0) -> None:
        """A step whose spans take SPANS times factor; `gap` in no span, `after` behind it."""
        self.begin(factor)
        self.time.now += gap
        self.clock.finish_step()
        self.time.now += after

    def begin(self, factor: float) -> None:
        self.clock.reset()
        for name, seconds in SPANS.items():
            with self.clock(name):
                self.time.now += seconds * factor

    def report(self, name: str) -> dict:
        return json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))


def test_averages_are_those_of_the_steps_in_the_window(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch)
    for factor in (50.0, 70.0, 1.0, 1.0, 2.0, 3.0, 3.0):  # the first two are warm-up
        played.step(factor, after=10.0)
    assert not list(tmp_path.iterdir())
    played.step(99.0)
    found = played.report("baseline_throughput")
    assert found["steps_measured"] == 5 and found["complete"]
    assert found["avg_step_time_s"] == pytest.approx(31.0)  # 15.5 s times a mean factor of 2
    assert found["avg_effective_step_time_s"] == pytest.approx(41.0)
    assert found["avg_outside_s"] == pytest.approx(10.0)
    assert found["avg_phase_backward_s"] == pytest.approx(16.0)
    assert found["avg_core_step_time_s"] == pytest.approx(29.0)
    assert found["avg_tokens_per_s"] == pytest.approx(100 / 31.0)
    assert found["avg_core_tokens_per_s"] == pytest.approx(100 / 29.0)
    assert found["phase_sum_share"] == pytest.approx(1.0) and found["phases_explain_step"]
    assert found["config_hash"] == "abc"
    assert all((tmp_path / f"{name}.json").is_file() for name in REPORTS)


def test_time_in_no_phase_is_found(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch)
    for _ in range(8):
        played.step(gap=1.0)
    found = played.report("baseline_throughput")
    assert found["phase_sum_share"] == pytest.approx(15.5 / 16.5)
    assert not found["phases_explain_step"]


def test_the_dominant_stage_and_substage_are_named(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch)
    for _ in range(8):
        played.step()
        played.clock.add("metrics", 40.0)
    found = played.report("window_10m_bottlenecks")
    assert found["dominant_stage"] == "metrics"
    assert found["stage_shares"]["metrics"] == pytest.approx(40.0 / 55.5)
    assert sum(found["stage_shares"].values()) == pytest.approx(1.0)
    assert found["dominant_optim_substage"] == "backward"
    assert found["optim_shares"]["backward"] == pytest.approx(0.8)
    assert found["train_shares"]["forward"] == pytest.approx(4.0 / 14.5)


def test_the_summary_holds_the_last_ten_minutes(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch, perf_warmup_steps=0)
    for factor in (30.0, 30.0, 1.0, 1.0, 1.0):
        played.step(factor, after=250.0)
    played.clock.close()
    assert played.report("baseline_throughput")["steps_measured"] == 5
    summary = played.report("window_10m_summary")
    assert summary["steps_measured"] == 3
    assert summary["avg_step_time_s"] == pytest.approx(15.5)
    assert summary["avg_ram_process_gb"] > 0.0


def test_undone_steps_count_for_nothing(tmp_path, monkeypatch):
    played = Played(tmp_path, monkeypatch)
    for _ in range(3):
        played.step()
    played.begin(500.0)  # ran out of memory: the next one begins without its end
    for _ in range(5):
        played.step()
    found = played.report("baseline_throughput")
    assert found["steps_measured"] == 5
    assert found["avg_step_time_s"] == pytest.approx(15.5)


def test_a_run_that_ends_inside_the_window_says_so(tmp_path, monkeypatch):
    played = Played(tmp_path / "early", monkeypatch)
    played.step()
    played.clock.close()
    assert played.said == ["performance window: no step was measured, no report"]
    played = Played(tmp_path / "late", monkeypatch)
    for _ in range(4):
        played.step()
    played.clock.close()
    assert played.report("baseline_throughput")["complete"] is False
    assert played.report("baseline_throughput")["steps_measured"] == 2


def test_phase_edges_wait_for_the_device_only_inside_the_window(tmp_path, monkeypatch):
    played = Played(tmp_path / "on", monkeypatch)
    waits = []
    for _ in range(9):
        before = played.time.waits
        played.step()
        waits.append(played.time.waits - before)
    edges = 2 * len(SPANS)
    assert waits == [0, 0, edges, edges, edges, edges, edges, 0, 0]
    played = Played(tmp_path / "off", monkeypatch, perf_sync_boundaries=False)
    for _ in range(8):
        played.step()
    assert played.time.waits == 0
    assert played.report("baseline_throughput")["sync_boundaries"] is False


def test_a_folder_that_cannot_be_written_costs_the_reports_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    played = Played(tmp_path / "file" / "perf", monkeypatch)
    for _ in range(8):
        played.step()
    assert len(played.said) == 1 and "was not written" in played.said[0]


def test_operators_are_summed_over_kept_steps_only():
    profile = OperatorProfile(on_device=False)
    matrix = torch.ones(8, 8)
    for keep in (True, False, True):
        profile.start()
        for _ in range(3):
            torch.mm(matrix, matrix)
        profile.stop(keep=keep)
    profile.stop(keep=True)  # nothing runs: nothing is counted
    report = profile.report()
    products = next(row for row in report["operators"] if row["name"] == "aten::mm")
    assert report["steps_profiled"] == 2
    assert products["calls_per_step"] == 3
    assert sum(row["share"] for row in report["operators"]) == pytest.approx(1.0)


def test_bottleneck_of_nothing_has_no_share():
    assert bottleneck(stage_seconds({})) == ("data", 0.0)
    assert stage_seconds({"hydra": 1.0, "credit": 2.0})["meta"] == 3.0
    columns = phase_columns(SPANS)
    assert columns["phase_optim_s"] == 10.0 and columns["phase_train_s"] == 14.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--perf-measure-steps", "10", "--perf-profiler-steps", "10"], "--perf-profiler-steps 10"),
        (["--perf-measure-steps", "100"], "--perf-warmup-steps + --perf-measure-steps = 120"),
    ],
)
def test_windows_that_cannot_be_are_refused(flags, message):
    arguments = ["--steps", "110", "--perf-profile-enable", *flags]
    with pytest.raises(ConfigError) as refused:
        parse_args(arguments)
    assert message in str(refused.value)
    assert not parse_args(["--no-perf-profile-enable", *arguments[:2], *flags]).perf.perf_report_dir


def test_the_clock_of_operators_must_exist():
    assert [times_on_device(mode, CPU) for mode in ("auto", "cpu")] == [False, False]
    cuda = torch.device("cuda")
    assert times_on_device("auto", cuda) and times_on_device("device", cuda)
    assert not times_on_device("cpu", cuda)
    with pytest.raises(EnvironmentProblem, match="--perf-device-time-mode cuda needs CUDA"):
        times_on_device("cuda", CPU)


def test_a_run_with_the_window_is_the_run_without_it(tmp_path):
    """Same tensors, same rows; reports beside them, and none without the flag."""
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    short = ("--steps", "16")
    train(tiny_flags(plain, *short), features=FEATURES)
    window = ("--perf-profile-enable", "--perf-warmup-steps", "2", "--perf-measure-steps", "8")
    reports = tmp_path / "reports"
    more = (*window, "--perf-profiler-steps", "2", "--perf-report-dir", str(reports))
    train(tiny_flags(watched, *short, *more), features=FEATURES)
    assert differences(plain, watched) == []
    assert not (plain / "perf").exists()
    names = {path.stem for path in reports.iterdir()}
    assert names == {*REPORTS, "window_10m_top_ops"}
    found = json.loads((reports / "baseline_throughput.json").read_text(encoding="utf-8"))
    assert found["steps_measured"] == 6 and found["complete"]
    assert 0.0 < found["phase_sum_share"] <= 1.0
    assert found["avg_phase_backward_s"] > 0.0 and found["avg_phase_data_s"] > 0.0
    operators = json.loads((reports / "window_10m_top_ops.json").read_text(encoding="utf-8"))
    assert operators["steps_profiled"] == 2
    assert any(row["name"] == "aten::mm" for row in operators["operators"])
