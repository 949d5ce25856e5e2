"""The benches' common face on played work: order, ratios, shares, rows of ways that fail."""

import json

import pytest
import torch

from scripts import bench_common
from scripts.bench_common import BenchOptions, Case, measure_case, parse_options, run_bench

CPU = torch.device("cpu")


class PlayedWork:
    """Ways whose calls move a played clock and are written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(BenchOptions, "now", lambda options: self.time)

    def way(self, name: str, *seconds: float):
        """Its calls take these seconds, the last one from then on."""

        def make():
            left = list(seconds)

            def run():
                self.calls.append(name)
                self.time += left.pop(0) if len(left) > 1 else left[0]

            return run

        return make


def options(**changes) -> BenchOptions:
    values = {"rounds": 7, "threads": 1, "clock": "cpu", "device": CPU}
    return BenchOptions(**(values | changes))


def case(ways, **more) -> Case:
    return Case(bench="b", name="c", unit="x/s", amount=10.0, ways=ways, **more)


def test_ways_run_in_turns_after_the_same_warm_up(monkeypatch):
    work = PlayedWork(monkeypatch)
    measure_case(case({"a": work.way("a", 1.0), "b": work.way("b", 2.0)}), options())
    rounds = ["a", "b", "b", "a"] * 3 + ["a", "b"]
    assert work.calls == ["a", "a", "b", "b", *rounds]


def test_ratios_are_taken_inside_a_round(monkeypatch):
    """A machine that becomes ten times slower for one round changes no ratio."""
    work = PlayedWork(monkeypatch)
    ours = work.way("a", 1.0, 1.0, 1.0, 1.0, 10.0, 1.0)
    peer = work.way("b", 2.0, 2.0, 2.0, 2.0, 20.0, 2.0)
    own, other = measure_case(case({"a": ours, "b": peer}), options())
    assert own["median"] == 10.0 and own["min"] == 1.0 and "ours_over_it" not in own
    assert other["ours_over_it"] == {"median": 2.0, "min": 2.0, "max": 2.0}


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_way_that_fails_keeps_its_row(monkeypatch, failing):
    work = PlayedWork(monkeypatch)

    def broken():
        raise ImportError("no such peer\nmore")

    ways = {name: broken if name == failing else work.way(name, 1.0) for name in "ab"}
    rows = {row["way"]: row for row in measure_case(case(ways), options())}
    assert rows[failing]["failed"] == "ImportError: no such peer"
    other = rows["b" if failing == "a" else "a"]
    assert other["median"] == 10.0 and "ours_over_it" not in other


def test_work_for_another_device_is_listed_as_not_measured(monkeypatch):
    work = PlayedWork(monkeypatch)
    (row,) = measure_case(case({"a": work.way("a", 1.0)}, on="cuda"), options())
    assert row["not_measured"] == "needs cuda" and work.calls == []


def test_products_are_counted_in_place_and_byte_products_too():
    left, right, total = torch.ones(3, 5), torch.ones(5, 7), torch.zeros(3, 7)
    stack = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.zeros(2, 3, 7)

    def run():
        torch.mm(left, right)
        total.addmm_(left, right)
        stack[2].baddbmm_(stack[0], stack[1])
        torch._int_mm(left.to(torch.int8), right.to(torch.int8))

    assert bench_common.count_flops(run) == 2 * 3 * 5 * 7 * 5


def test_the_result_says_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_common,
        "measure_ceilings",
        lambda options: {"product_gflops": 2.0, "copy_gb_per_s": 4.0},
    )
    work = PlayedWork(monkeypatch)
    matrix = torch.ones(100, 100)

    def product():
        def run():
            work.time += 1e-3
            return matrix @ matrix

        return run

    cases = [case({"a": product}, count_products=True), case({"b": product}, bytes_moved=1e6)]
    output = tmp_path / "new" / "r.json"
    threads = torch.get_num_threads()
    try:
        assert run_bench("What.\nMore.", lambda options: cases, ["--json", str(output)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["what"] == "What." and result["threads"] == 1 and result["clock"] == "cpu time"
    assert result["rounds"] == 7 and result["machine"]["cpus"] and result["versions"]["torch"]
    assert result["rows"][0]["sol_percent"] == 100.0  # 2 MFLOP in a ms, at 2 GFLOP/s
    assert result["rows"][1]["sol_percent"] == 25.0  # 1 MB in a ms, at 4 GB/s


def test_a_failed_row_is_a_failed_bench(monkeypatch):
    def broken():
        raise RuntimeError("not the same loss")

    work = PlayedWork(monkeypatch)
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        bench_common,
        "measure_ceilings",
        lambda options: {"product_gflops": 1.0, "copy_gb_per_s": 1.0},
    )
    ways = {"a": work.way("a", 1.0), "b": broken}
    try:
        assert run_bench("What.", lambda options: [case(ways)], []) == 1
        assert run_bench("What.", lambda options: [case(ways)], ["--only", "nothing"]) == 0
    finally:
        torch.set_num_threads(threads)


def test_a_stopped_bench_goes_on_with_the_cases_that_are_missing(tmp_path, monkeypatch, capsys):
    peak = {"product_gflops": 1.0, "copy_gb_per_s": 1.0}
    monkeypatch.setattr(bench_common, "measure_ceilings", lambda options: peak)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    work, output = PlayedWork(monkeypatch), tmp_path / "r.json"

    def stop():
        raise KeyboardInterrupt

    def bench(second, *more):
        ways = {"first": {"a": work.way("a", 1.0)}, "second": {"b": second}}
        cases = [
            Case(bench="b", name=name, unit="x/s", amount=1.0, ways=way)
            for name, way in ways.items()
        ]
        return run_bench("What.", lambda options: cases, ["--json", str(output), *more])

    with pytest.raises(KeyboardInterrupt):
        bench(stop)
    measured, work.calls = len(work.calls), []
    assert measured and bench(work.way("b", 1.0), "--resume") == 0
    assert set(work.calls) == {"b"}
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [row["case"] for row in result["rows"]] == ["first", "second"] and result["complete"]
    assert [part["ceilings"] for part in result["earlier_parts"]] == [peak]
    assert bench(stop, "--resume", "--rounds", "8") == 2
    assert "another rounds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "6"], "--rounds 6"),
        (["--device", "cuda"], "--device"),
        (["--resume"], "--resume"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        parse_options("", arguments)
    assert run_bench("", lambda options: [], arguments) == 2
    assert message in capsys.readouterr().err
