"""The list of arms stands, a finished run is not made again, placebos destroy what they should."""

import json
from dataclasses import replace

import pytest
import torch

from scripts import ablate_features
from scripts.ablate_features import (
    Plan,
    Record,
    Row,
    about,
    equal_time_steps,
    find,
    main,
    make_runs,
)
from scripts.ablation import Arm, Outcome
from scripts.placebos import PLACEBOS
from tests.integration.runs import tiny_flags
from training.build import build_trainer
from training.config.cli import parse_args

ROWS = (
    Row(feature="f", off="base", on="on", placebo="placebo"),
    Row(feature="g", off="without", on="base"),
)


def small_plan(**changes):
    names = ("base", "on", "placebo", "without")
    plan = Plan(
        flags=("--no-require-cuda",),
        steps=100,
        cost_steps=10,
        seeds=(0, 1, 2),
        arms={name: Arm(name=name, flags=("--seed", str(n))) for n, name in enumerate(names)},
        rows=ROWS,
    )
    return replace(plan, **changes)


def planted(plan, record, *, on, cost=1.25):
    """Runs of every arm whose bits per byte are 1 + seed, and `on` more of the arm "on"."""
    for name in plan.arms:
        if plan.rival(name) != name:
            record.add_cost(ablate_features.pair_of(plan, name), cost)
        for seed in plan.seeds:
            for steps in {plan.steps, equal_time_steps(plan, record, name)}:
                more = on + 0.001 * seed if name == "on" else 0.0
                outcome = Outcome(bpb=1.0 + seed + more, steps=steps, seconds=1.0)
                record.add_run(plan.key(name), outcome, seed=seed)


def test_the_list_of_the_repository_stands():
    plan = Plan.read()
    assert plan.key("base") == "nothing" and len(plan.seeds) >= 3
    used = {name for row in plan.rows for name in row.arms}
    assert used == set(plan.arms)
    assert {arm.placebo for arm in plan.arms.values() if arm.placebo} == set(PLACEBOS)
    keys = [plan.key(name) for name in plan.arms]
    assert len(set(keys)) == len(keys)


def test_a_row_is_compared_with_its_own_arms(tmp_path):
    plan = small_plan()
    record = Record(tmp_path / "r.json", about(plan))
    planted(plan, record, on=-0.1)
    found = find(plan, record, ROWS[0])
    assert found.is_complete and found.cost == 1.25
    assert [part.mean for part in found.comparisons] == pytest.approx([-0.099] * 3)
    assert {part.verdict for part in found.comparisons} == {"helps"}
    other = find(plan, record, ROWS[1])
    assert other.is_complete and other.cost == 0.8 and other.placebo is None
    assert {part.verdict for part in other.comparisons} == {"no effect"}


def test_the_arm_whose_time_others_get_runs_once(tmp_path):
    plan = small_plan()
    record = Record(tmp_path / "r.json", about(plan))
    planted(plan, record, on=0.0)
    assert equal_time_steps(plan, record, "base") == 100
    assert equal_time_steps(plan, record, "without") == 80
    assert set(record.runs[plan.key("base")]) == {f"{seed}, 100 steps" for seed in range(3)}


def test_a_record_keeps_what_another_process_wrote_and_finished_runs_are_not_made(
    tmp_path, monkeypatch
):
    plan, path = small_plan(), tmp_path / "r.json"
    first, second = Record(path, about(plan)), Record(path, about(plan))
    first.add_run("a", Outcome(bpb=1.0, steps=5, seconds=2.0), seed=0)
    second.add_run("b", Outcome(bpb=2.0, steps=5, seconds=2.0), seed=0)
    assert set(json.loads(path.read_text(encoding="utf-8"))["runs"]) == {"a", "b"}
    assert not path.with_suffix(".lock").exists()
    planted(plan, second, on=0.0)
    monkeypatch.setattr(ablate_features, "run_side_by_side", None)  # not called
    make_runs(plan, second, list(plan.arms))
    with pytest.raises(ValueError, match="other common flags"):
        Record(path, about(replace(plan, flags=("--steps", "3"))))


def test_faults_in_a_list_are_named():
    with pytest.raises(ValueError, match="there is no arm 'nobody'"):
        small_plan(rows=(Row(feature="f", off="base", on="nobody"),)).check()
    with pytest.raises(ValueError, match="against names none"):
        small_plan(rows=(Row(feature="f", off="on", on="without"),)).check()
    with pytest.raises(ValueError, match="no placebo 'sugar'"):
        small_plan(arms={"a": Arm(name="a", placebo="sugar")}, rows=()).check()


def test_arms_run_from_a_list_to_a_file(tmp_path, capsys):
    flags = " ".join(tiny_flags(tmp_path, "--no-ema-enabled", "--no-curriculum-enabled"))
    path, output = tmp_path / "list.toml", tmp_path / "out.json"
    path.write_text(
        f'steps = 4\ncost_steps = 4\nseeds = [0, 1]\nflags = "{flags}"\n[arms]\nbase = {{}}\n'
        'slow = { flags = "--lr 1e-6 --adam-lr 1e-6" }\n'
        '[[rows]]\nfeature = "f"\noff = "slow"\non = "base"\n',
        encoding="utf-8",
    )
    assert main(["--json", str(output), "--list", str(path)]) == 0
    plan = Plan.read(path)
    found = find(plan, Record(output, about(plan)), plan.rows[0])
    assert found.is_complete and found.tokens is not None and found.tokens.mean < 0.0
    assert "a step costs" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(PLACEBOS))
def test_a_placebo_takes_the_signal_and_leaves_the_network(name, tmp_path):
    """It changes what is learned, or what comes out where the signal is in the forward."""

    def losses(placebo):
        own = tiny_flags(tmp_path / placebo, "--router-balance-lr", "0.01", "--seed", "5")
        trainer = build_trainer(parse_args([*own, "--steps", "6", "--seq-len", "32"]))
        if placebo:
            PLACEBOS[placebo](trainer)
        trainer.services.recorder.open(metrics_offset=None)
        trainer.features.run("on_setup", replace(trainer.begin_step(), step=0))
        found = [_loss(trainer) for _ in range(6)]
        trainer.features.close()
        trainer.stream.close()
        trainer.services.recorder.close()
        return found, sum(p.numel() for p in trainer.model.parameters())

    (plain, size), (spoiled, same_size) = losses(""), losses(name)
    assert size == same_size and plain != spoiled
    assert all(torch.tensor(spoiled).isfinite())


def _loss(trainer):
    """Of one step more."""
    ctx = trainer.attempt_step()
    assert ctx is not None and ctx.train_loss is not None
    return float(ctx.train_loss)


def test_a_misplaced_memory_reads_other_rows_at_other_places(tmp_path):
    trainer = build_trainer(parse_args(tiny_flags(tmp_path)))
    trainer.stream.close()
    PLACEBOS["misplaced memory"](trainer)
    layer = next(m for m in trainer.model.modules() if type(m).__name__ == "Engram")
    asked = []
    inner = layer._ngram_keys
    layer._ngram_keys = lambda *a: asked.append(inner(*a)) or asked[-1]
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    with torch.no_grad():
        trainer.model(ids, reset_mask=torch.zeros_like(ids, dtype=torch.bool))
    keys = asked[0][0][0]  # (T, orders)
    assert (keys[2] != keys[5]).all()
    factor = torch.tensor([3, 6]) * 0x9E3779B97F
    assert torch.equal(keys[2] ^ factor[0], keys[5] ^ factor[1])
