"""Suite R8 over settings: each pair of choices below is resumed at a step, bit for bit.

The rows are a covering array: any two columns take every pair of their values in some row, which
is where errors of a state that is not saved show up (Kuhn et al., NIST SP 800-142).
"""

import itertools
import random
import shutil

import pytest

from tests.integration.lives import begin_life, reap
from tests.integration.runs import (
    checkpoint_differences,
    differences,
    row_differences,
    stop_after,
    tiny_flags,
    train,
)
from training.build import build_trainer
from training.config.cli import parse_args
from training.config.fields import iter_flags
from training.config.sigma_config import SigmaConfig
from training.features import FEATURES

STEPS = 12
OPTIMIZERS = next(f for f in iter_flags(SigmaConfig) if f.name == "--optimizer").rule.choices
CHOICES = {
    "optimizer": [
        ("--optimizer", "adamw"),
        ("--optimizer", "muon"),
        ("--optimizer", "soap", "--soap-refresh", "3"),
        ("--optimizer", "galore-lion", "--lion-state-dtype", "bf16", "--galore-rank", "4"),
    ],
    "average": [("--ema-enabled",), ("--no-ema-enabled",)],
    "curriculum": [("--curriculum-enabled",), ("--no-curriculum-enabled",)],
    "memory": [("--engram-enabled",), ("--no-engram-enabled",)],
    "accumulation": [("--grad-accum-steps", "2"), ("--grad-accum-steps", "1")],
    "layout": [("--residual-layout", "standard"), ("--residual-layout", "two-stream")],
    "experts": [("--n-routed-experts", "4"), ("--n-routed-experts", "0")],
    "noise": [
        ("--dropout", "0.1", "--router-jitter-noise", "0.05"),
        ("--dropout", "0", "--router-jitter-noise", "0"),
    ],
    "weights": [("--quant-mode", "bitnet_1_58"), ("--quant-mode", "none")],
}


def pairs_of(row):
    return {
        ((one, row[one]), (two, row[two])) for one, two in itertools.combinations(sorted(row), 2)
    }


def covering_rows(choices):
    """Few rows that hold every pair of values of two columns: the best of many random ones."""
    draw = random.Random(0)
    columns = {name: tuple(values) for name, values in choices.items()}
    missing = set()
    for one, two in itertools.combinations(sorted(columns), 2):
        missing |= {((one, a), (two, b)) for a in columns[one] for b in columns[two]}
    rows = []
    while missing:
        candidates = [{n: draw.choice(v) for n, v in columns.items()} for _ in range(200)]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        if not pairs_of(best) & missing:
            (one, a), (two, b) = min(missing)
            best = {n: draw.choice(v) for n, v in columns.items()} | {one: a, two: b}
        rows.append(best)
        missing -= pairs_of(best)
    return rows


def make_configurations():
    named = {}
    for number, row in enumerate(covering_rows(CHOICES)):
        flags = tuple(itertools.chain.from_iterable(row.values()))
        named[f"{number:02d}-{row['optimizer'][1]}"] = flags
    return named


CONFIGURATIONS = make_configurations()


def resume_differences(home, flags, step):
    """How a run that was resumed at `step` differs from one that was not; the latter is kept."""
    settings = (
        "--steps", str(STEPS), "--eval-interval", "0", "--ema-start-fraction", "0.2", *flags,
    )  # fmt: skip
    whole, resumed = home / "whole", home / "resumed"
    if not whole.exists():
        train(tiny_flags(whole, *settings, "--save-interval", "1"))
    shutil.rmtree(resumed, ignore_errors=True)
    shutil.copytree(whole, resumed)
    for later in (resumed / "checkpoints").glob("checkpoint_step_*"):
        if later.name > f"checkpoint_step_{step:08d}":
            shutil.rmtree(later)
    train(tiny_flags(resumed, *settings, "--save-interval", str(STEPS)))
    return differences(whole, resumed)


def every_resume(home, flags, *, steps=64):
    """(step, differences) of a run that is resumed at each step and does the next one.

    What it then saves is compared with what the whole run saved there, which is all that decides
    the rest; so exact single steps make exact runs. The trainer is built once and forked.
    """
    settings = (
        "--steps", str(steps), "--eval-interval", "0", "--ema-start-fraction", "0.2",
        "--sample-interval", "0", *flags,
    )  # fmt: skip
    whole, resumed = home / "whole", home / "resumed"
    train(tiny_flags(whole, *settings, "--save-interval", "1"))
    target = [0]

    class StopAtTarget(stop_after(0, resumed)):
        def after_step(self, ctx):
            in_arm = ctx.trials is not None and ctx.trials.in_other_arm  # no step of the run
            if ctx.step == target[0] and not in_arm:
                (resumed / "STOP").touch()
            return False

    config = parse_args(tiny_flags(resumed, *settings, "--save-interval", str(steps)))
    trainer = build_trainer(config, features=(*FEATURES, StopAtTarget))
    for step in range(1, steps):
        target[0] = step + 1
        shutil.rmtree(resumed, ignore_errors=True)
        start, end = (f"checkpoint_step_{number:08d}" for number in (step, step + 1))

        def other(directory, names, start=start):
            return [n for n in names if n.startswith("checkpoint_step_") and n != start]

        shutil.copytree(whole, resumed, ignore=other)
        if reap(begin_life(trainer)) != 0:
            yield step, ["the resumed run failed"]
            continue
        rows = row_differences(whole, resumed, last=step + 1)
        one, two = (path / "checkpoints" / end for path in (whole, resumed))
        yield step, checkpoint_differences(one, two, rows=rows)


def test_every_pair_of_choices_is_in_some_row():
    covered = set().union(*(pairs_of(row) for row in covering_rows(CHOICES)))
    count = 0
    for one, two in itertools.combinations(sorted(CHOICES), 2):
        for a, b in itertools.product(CHOICES[one], CHOICES[two]):
            assert ((one, a), (two, b)) in covered
            count += 1
    assert count > 100 and len(CONFIGURATIONS) < 20


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_once(ram_path, name):
    step = random.Random(name).randrange(1, STEPS)
    assert resume_differences(ram_path, CONFIGURATIONS[name], step) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "gnprox"])
def test_every_optimizer_resumes(ram_path, name):
    """gnprox runs on CUDA only; tests/training/optim/test_family.py resumes it."""
    assert resume_differences(ram_path, ("--optimizer", name), 7) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resumed_at_every_step(ram_path, name):
    for step, found in every_resume(ram_path, CONFIGURATIONS[name]):
        assert found == [], step


@pytest.mark.soak
def test_a_resume_that_forgets_is_noticed_at_every_step(ram_path, monkeypatch):
    """Negative control of the single steps: the stream starts anew."""
    broken = "training.data.TokenStream.load_state_dict"
    monkeypatch.setattr(broken, lambda *args, **kwargs: None)
    flags = next(iter(CONFIGURATIONS.values()))
    assert all(found for _, found in every_resume(ram_path, flags, steps=6))
