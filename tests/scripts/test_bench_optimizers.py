"""The bench must measure what it says: interpolated steps, tuned rates, paired runs, no repeats."""

from __future__ import annotations

import json
import math

import pytest

from scripts import bench_optimizers
from scripts.bench_optimizers import (
    ARMS,
    PRESETS,
    Bench,
    arm_config,
    build_parser,
    interval,
    main,
    steps_to,
)
from training.config.cli import parse_args
from training.config.sections import OPTIMIZERS

TINY = (
    "--d-model 16 --n-heads 1 --n-layers 1 --mamba-ratio 1 --attention-ratio 0 --d-ff 24 "
    "--mamba-head-dim 16 --mamba-d-state 4 --n-routed-experts 0 --n-shared-experts 0 --seq-len 16 "
    "--batch-size 2 --steps 4 --eval-interval 2 --eval-tokens 64"
)


@pytest.mark.parametrize(
    ("target", "expected"), [(3.0, 10.0), (2.5, 15.0), (2.0, 20.0), (1.9, 25.0), (1.0, None)]
)
def test_steps_are_interpolated_and_the_first_ones(target, expected):
    curve = [(10, 3.0), (20, 2.0), (30, 1.8), (40, 2.2)]
    assert steps_to(curve, target) == (None if expected is None else pytest.approx(expected))


def test_intervals_are_students():
    """Mean 2, standard deviation 1, n = 3: 4.303 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == {"mean": 2.0, "half_width_95": pytest.approx(2.4843, 1e-4)}
    assert interval([5.0])["half_width_95"] is None


class Valley(Bench):
    """A bench whose final loss has its minimum at a known rate."""

    def __init__(self, at):
        self.at, self.result, self.tried = at, {"runs": {}}, []

    def final(self, arm, *, lr, seed):
        self.tried.append(lr)
        return math.inf if lr > 0.5 else abs(math.log(lr / self.at))


@pytest.mark.parametrize("at", [0.02, 0.005, 0.16])
def test_a_best_rate_at_the_edge_moves_the_grid(at, monkeypatch):
    monkeypatch.setitem(ARMS, "muon", ("", (0.01, 0.02, 0.04)))
    valley = Valley(at)
    assert valley.best_rate("muon", 1) == pytest.approx(at)
    assert min(valley.tried) < at < max(valley.tried)


def test_a_rate_that_diverges_is_none_in_the_record(monkeypatch):
    monkeypatch.setitem(ARMS, "muon", ("", (0.2, 0.4, 0.8)))
    valley = Valley(0.4)
    valley.best_rate("muon", 1)
    assert valley.result["grids"]["muon"]["0.8"] is None


def test_every_arm_and_preset_is_a_valid_configuration():
    named = {ARMS[arm][0].split()[1] for arm in ARMS}
    assert named == set(OPTIMIZERS) - {"gnprox"}  # which runs on CUDA only
    for preset in PRESETS:
        for arm in ARMS:
            config = bench_optimizers.arm_config(preset, arm, lr=0.01, seed=3, more=[])
            assert (config.optim.lr, config.run.seed) == (0.01, 3)
    parse_args(PRESETS["small"].split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "result.json"
    grids = {"adamw": (0.01,), "muon": (0.02,)}
    patch = pytest.MonkeyPatch()
    for arm, grid in grids.items():
        patch.setitem(ARMS, arm, (ARMS[arm][0], grid))
    patch.setattr(bench_optimizers, "MAX_EXTENSIONS", 0)
    arguments = ["--only", "muon,adamw", "--seeds", "1,2", "--rounds", "2", "--flags", TINY]
    main([*arguments, "--out", str(out)])
    first = out.read_text()
    starts = []
    patch.setattr(bench_optimizers.Trial, "run", lambda trial: starts.append(trial))
    main([*arguments, "--out", str(out)])
    patch.undo()
    return json.loads(first), json.loads(out.read_text()), starts


def test_a_second_call_repeats_no_run(finished):
    first, second, starts = finished
    assert starts == [] and first["runs"] == second["runs"]


def test_runs_share_data_and_weights_and_differ_by_optimizer(finished):
    runs = finished[0]["runs"]
    assert set(runs) == {f"{a} seed={s}" for a in ("adamw lr=0.01", "muon lr=0.02") for s in (1, 2)}
    finals = [run["final_bpb"] for run in runs.values()]
    assert len(set(finals)) == 4
    assert all(abs(final - finals[0]) < 0.2 for final in finals)


def test_the_table_names_target_steps_and_costs(finished):
    result = finished[0]
    rows = result["table"]
    finals = [result["runs"][f"adamw lr=0.01 seed={seed}"]["final_bpb"] for seed in (1, 2)]
    assert result["target_bpb"] == finals
    assert max(rows["adamw"]["steps_to_target"]) <= 4
    assert rows["muon"]["steps_over_muon"]["mean"] == 1.0
    assert {"torch fused adamw", "torch muon", "adamw", "muon"} <= set(result["update_cpu_ms"])
    assert all(row["step_cpu_ms"] > row["clip_and_update_cpu_ms"] for row in rows.values())


def test_updates_can_be_timed_alone(tmp_path):
    out = tmp_path / "result.json"
    arguments = ["--only", "adamw,soap", "--rounds", "1", "--flags", TINY, "--updates-only"]
    main([*arguments, "--out", str(out)])
    result = json.loads(out.read_text())
    timed = set(result["update_cpu_ms"])
    assert {"torch foreach adamw", "gnprox, on this device", "adamw, one by one", "soap"} <= timed
    assert result["runs"] == {}


def test_credit_shares_c3os_rate_and_every_arm_lacks_the_probe_text(tmp_path, monkeypatch):
    for arm in ("adamw", "c3o"):
        monkeypatch.setitem(ARMS, arm, (ARMS[arm][0], (0.01,)))
    monkeypatch.setattr(bench_optimizers, "MAX_EXTENSIONS", 0)
    out = tmp_path / "result.json"
    arms = "adamw,c3o,c3o-credit,c3o-shuffled"
    more = f"{TINY} --c3o-probe-interval 2 --c3o-block-size 64 --probe-batches 2"
    main(["--only", arms, "--seeds", "1", "--rounds", "1", "--flags", more, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["best_lr"]["c3o-credit"] == result["best_lr"]["c3o"] and len(result["runs"]) == 4
    finals = {arm: row["final_bpb"]["mean"] for arm, row in result["table"].items()}
    assert len({finals[arm] for arm in ("c3o", "c3o-credit", "c3o-shuffled")}) == 3
    options = build_parser().parse_args(["--only", arms, "--flags", more, "--out", str(out)])
    bench = Bench(options)
    plain = build_parser().parse_args(["--flags", more, "--out", str(tmp_path / "other.json")])
    kept, whole = (len(b.corpus.splits["train"].tokens) for b in (bench, Bench(plain)))
    assert kept < whole


def test_another_setting_needs_another_file(tmp_path):
    out = tmp_path / "result.json"
    out.write_text(json.dumps({"setting": "small", "runs": {}}))
    options = build_parser().parse_args(["--out", str(out), "--flags", "--steps 3"])
    with pytest.raises(SystemExit, match="another setting"):
        Bench(options)


@pytest.mark.parametrize("preset", ["small", "quickstart"])
def test_every_arm_is_another_optimizer(preset):
    """A profile's flag must not win over the one that an arm is named after."""
    configs = {name: arm_config(preset, name, lr=0.01, seed=1, more=[]) for name in ARMS}
    optimizers = [(config.optim, config.c3o) for config in configs.values()]
    assert all(optimizers.count(one) == 1 for one in optimizers)
    assert configs["muon-polar"].optim.muon_iteration == "polar-express"
