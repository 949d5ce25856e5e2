"""Planted effects are found, equal arms are equal to the bit, and turns do not mix runs."""

import json
import time

import pytest

from scripts.ablate import ablate, comparisons, equal_time_steps, main, table
from scripts.ablation import Arm, Outcome, run_side_by_side
from tests.integration.runs import tiny_flags

QUIET = ("--no-ema-enabled", "--no-curriculum-enabled", "--eval-tokens", "512")
SLOW = ("--lr", "1e-6", "--adam-lr", "1e-6")


def common(directory):
    return tiny_flags(directory, *QUIET, "--lr", "0.02", "--adam-lr", "0.02")


def outcomes(**bpb):
    return {name: Outcome(bpb=value, steps=10, seconds=1.0) for name, value in bpb.items()}


def test_an_arm_is_a_name_and_flags():
    assert Arm.parse("on: --a 1 --b") == Arm(name="on", flags=("--a", "1", "--b"))
    assert Arm.parse("off:") == Arm(name="off") == Arm.parse("off")
    with pytest.raises(ValueError, match="name:flags"):
        Arm.parse(": --a")


def test_a_run_among_others_is_the_run_alone_to_the_bit(tmp_path):
    arms = [Arm(name="a"), Arm(name="other", flags=("--dropout", "0.2")), Arm(name="b")]
    steps = {"a": 7, "other": 5, "b": 7}

    def run(arms):
        return run_side_by_side(
            common(tmp_path), arms, seed=3, steps=steps, directory=tmp_path,
            clock=time.process_time, turn_steps=2,
        )  # fmt: skip

    together, alone = run(arms), run(arms[:1])
    assert together["a"].bpb == together["b"].bpb == alone["a"].bpb
    assert together["other"].bpb != together["a"].bpb
    assert [together[name].steps for name in steps] == [7, 5, 7]
    assert all(outcome.seconds > 0.0 for outcome in together.values())


def test_an_average_is_judged_by_itself_and_trials_run_their_arms(tmp_path):
    """At a decay that fp32 loses, the average is the last weights; trials promote nothing here."""
    ema = ("--ema-enabled", "--ema-start-fraction", "0", "--weights", "ema")
    trials = ("--uroboros-enabled", "--uroboros-interval", "4", "--uroboros-trial-horizon-steps",
              "4", "--no-forward-research-loop-enabled")  # fmt: skip
    arms = [
        Arm(name="plain"),
        Arm(name="last", flags=(*ema, "--ema-decay", "1e-12")),
        Arm(name="average", flags=(*ema, "--ema-decay", "0.9")),
        Arm(name="trials", flags=trials),
    ]
    found = run_side_by_side(
        [*common(tmp_path), "--probe-held-out", "--probe-batches", "2"], arms, seed=3,
        steps={arm.name: 9 for arm in arms}, directory=tmp_path, clock=time.process_time,
    )  # fmt: skip
    assert found["plain"].bpb == found["last"].bpb == found["trials"].bpb
    assert found["average"].bpb != found["plain"].bpb
    records = (tmp_path / "trials-3-9" / "uroboros_patch_history.jsonl").read_text("utf-8")
    assert records.count('"replicate"') == 1


def test_a_planted_harm_and_an_equal_arm_get_their_verdicts(tmp_path, capsys):
    output = tmp_path / "results" / "result.json"
    flags = [
        *common(tmp_path), "--ablate-steps", "12", "--seeds", "0,1,2", "--turn-steps", "6",
        "--clock", "cpu", "--output", str(output),
        "--arm", "off:", "--arm", "same:", "--arm", "worse: " + " ".join(SLOW),
    ]  # fmt: skip
    assert main(flags) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    found = result["comparisons"]
    assert result["is_complete"]
    assert found["worse"]["equal tokens, against off"]["verdict"] == "harms"
    assert found["worse"]["verdict"] == "harms"
    same = found["same"]["equal tokens, against off"]
    assert same["mean"] == 0.0 and same["interval"] == [0.0, 0.0]
    assert same["verdict"] == "no effect"
    assert "| worse | all | | | **harms** |" in capsys.readouterr().out


def test_an_arm_must_beat_the_placebo_too():
    seeds = {
        seed: outcomes(off=1.0 + seed, on=0.9 + seed + 0.001 * seed, placebo_x=0.9 + seed)
        for seed in range(3)
    }
    found = comparisons(seeds, seeds, names=["off", "on", "placebo_x"])
    assert found["on"]["equal tokens, against off"]["verdict"] == "helps"
    assert found["on"]["equal time, against placebo_x"]["verdict"] == "no effect"
    assert found["on"]["verdict"] == "no effect"
    assert set(found["placebo_x"]) == {
        "equal tokens, against off", "equal time, against off", "verdict",
    }  # fmt: skip
    assert "helps" in table({"comparisons": found})


def test_an_unfinished_result_compares_what_it_has():
    seeds = {seed: outcomes(off=1.0 + seed, on=0.9 + seed + 0.001 * seed) for seed in range(2)}
    found = comparisons(seeds, {0: seeds[0]}, names=["off", "on"])
    assert set(found["on"]) == {"equal tokens, against off", "verdict"}


def test_equal_time_may_be_left_out():
    asked, saved = [], []

    def run(arms, *, seed, steps):
        asked.append((seed, steps))
        dear = Outcome(bpb=0.9 + seed + 0.001 * seed, steps=10, seconds=3.0)
        return outcomes(off=1.0 + seed) | {"on": dear}

    arms = [Arm(name="off"), Arm(name="on")]
    found = ablate(run, arms, seeds=[0, 1], steps=10, save=saved.append, tokens_only=True)
    assert asked == [(seed, {"off": 10, "on": 10}) for seed in (0, 1)]
    assert found == saved[-1] and found["is_complete"] and found["equal_time"] == {}
    assert set(found["comparisons"]["on"]) == {"equal tokens, against off", "verdict"}


def test_equal_time_gives_a_dear_arm_fewer_steps():
    def costs(*seconds):
        names = ("off", "same", "dear")
        return {n: Outcome(bpb=1.0, steps=100, seconds=s) for n, s in zip(names, seconds)}

    runs = {0: costs(10.0, 10.1, 12.4), 1: costs(20.0, 20.2, 25.0), 2: costs(10.0, 10.0, 12.5)}
    assert equal_time_steps(runs, steps=100) == {"off": 100, "same": 100, "dear": 80}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arm", "a:", "--arm", "a:"], "different names"),
        (["--arm", "a:", "--arm", "b: --no-such-flag"], "arm b"),
        (["--arm", "a:", "--arm", ": --x"], "name:flags"),
    ],
)
def test_wrong_arms_are_refused_in_one_line(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*flags, *common(tmp_path), "--seeds", "0,1", "--ablate-steps", "2"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
