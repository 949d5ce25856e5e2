"""Search and rule in whole runs: the rate they give, evidence, exact resume, nothing when off."""

import itertools
import math

import pytest

from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES
from training.schedule import step_factors

LR = 0.02
RUN = (
    "--probe-batches", "4", "--probe-held-out", "--steps", "21", "--save-interval", "50",
    "--lr", str(LR), "--adam-lr", "0.01", "--eval-interval", "0", "--sample-interval", "0",
    "--no-ema-enabled", "--no-curriculum-enabled", "--grad-accum-steps", "1",
)  # fmt: skip
ON = (
    *RUN, "--self-improver-enabled", "--self-improver-interval", "1",
    "--self-evolve-interval", "3", "--self-evolve-history", "4",
)  # fmt: skip
OWN = ("self_improver", "self_evolve")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_flags(directory, *ON))
    return directory


def test_the_rate_of_every_step_is_schedule_times_clipped_product(whole):
    optim = parse_args(tiny_flags(whole, *ON)).optim
    rows = metrics_rows(whole)[1:]
    policy, rule = 1.0, 1.0  # of the step before
    for row in rows:
        schedule, _ = step_factors(row["step"], total_steps=21, optim=optim)
        expected = LR * schedule * min(1.8, max(0.5, rule * policy))
        assert row["lr"] == pytest.approx(expected, rel=1e-12)
        policy, rule = row["policy_lr_mul"], row["self_evolve_lr_factor"]
    assert len({row["lr"] / step_factors(row["step"], total_steps=21, optim=optim)[0]
                for row in rows}) > 8  # fmt: skip


def test_quadruples_are_back_to_back_and_the_rule_waits_for_their_ends(whole):
    rows = metrics_rows(whole)[1:]
    # Begun after step 1, ended after 5, 9, 13, 17 and 21.
    assert [row["self_improver_quadruples"] for row in rows] == [
        float((step - 1) // 4) for step in range(1, 22)
    ]
    changed = [
        after["step"]
        for before, after in itertools.pairwise(rows)
        if after["self_evolve_lr_factor"] != before["self_evolve_lr_factor"]
    ]
    assert changed and set(changed) <= {5, 9, 13, 17, 21}
    last = rows[-1]
    centres = [0.0, *(row["self_improver_theta_norm"] for row in rows)]
    moves = sum(one != other for one, other in itertools.pairwise(centres))
    # Votes may cancel exactly: such a quadruple moves nothing and is not counted.
    assert last["feature_self_improver_effective_calls"] == moves >= 3
    assert last["feature_self_evolve_effective_calls"] == len(changed)
    assert last["self_improver_knobs"] == 1.0
    assert last["policy_ttrl_interval_mul"] is None and last["policy_replay_bias"] is None
    assert 0.0 < last["self_improver_theta_norm"] < 0.05
    for place in range(4, 20, 4):  # inside a quadruple two trials up, two down, around one centre
        inside = {round(row["policy_lr_mul"], 12) for row in rows[place - 4 : place]}
        assert len(inside) == 2


def test_stopped_inside_a_quadruple_it_resumes_to_the_bit(whole, tmp_path):
    directory = tmp_path / "run"
    for step in (1, 7, 16):
        train(tiny_flags(directory, *ON), features=(*FEATURES, stop_after(step, directory)))
    train(tiny_flags(directory, *ON))
    assert differences(whole, directory) == []


def test_off_is_the_run_without_them(tmp_path):
    others = tuple(feature for feature in FEATURES if feature.name not in OWN)
    train(tiny_flags(tmp_path / "off", *RUN, "--steps", "8"))
    train(tiny_flags(tmp_path / "absent", *RUN, "--steps", "8"), features=others)
    rows = [metrics_rows(tmp_path / name)[1:] for name in ("off", "absent")]
    for name in ("train_loss", "grad_norm", "lr"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    found = differences(tmp_path / "off", tmp_path / "absent")
    assert [name for name in found if not name.startswith(("row", "features"))] == []


def test_switched_off_on_resume_the_rate_is_the_schedule_again(whole, tmp_path):
    directory = tmp_path / "run"
    train(tiny_flags(directory, *ON), features=(*FEATURES, stop_after(7, directory)))
    train(tiny_flags(directory, *RUN, "--steps", "9"))
    row = metrics_rows(directory)[-1]
    optim = parse_args(tiny_flags(directory, *RUN)).optim
    assert row["lr"] == LR * step_factors(9, total_steps=9, optim=optim)[0]
    assert "policy_lr_mul" not in row


@pytest.mark.parametrize("flags", [("--self-improver-enabled",), ("--self-evolve-interval", "4")])
def test_text_without_a_probe_is_refused(flags):
    with pytest.raises(ConfigError, match=rf"{flags[0]} needs probe text") as failure:
        parse_args([*flags, "--data-backend", "local", "--local-path", "x"])
    mend = "--self-evolve-interval 0" if len(flags) == 2 else "--no-self-improver-enabled"
    assert mend in str(failure.value)


def test_a_size_outside_its_bounds_is_refused():
    with pytest.raises(ConfigError, match=r"--self-improver-mutation-sigma 0\.5 must lie between"):
        parse_args(["--self-improver-mutation-sigma", "0.5"])
    assert math.isclose(parse_args([]).self_evolve.lr_max_factor, 1.8)
