"""Suite R19: NaN or Inf at 500 points of a step is caught in it, and costs no good step.

Points: the embedding of a batch, a loss, an element of a gradient, of a moment, of a weight. After
a bad batch the next one is trained on as if the bad one had never been there; after damage to
weights or moments the run stands exactly where its checkpoint stands, with the same data ahead.
"""

import copy
import random

import pytest
import torch

import training.sigma_trainer
import training.weight_update
from tests.integration.runs import tiny_flags
from training.build import build_trainer
from training.config.cli import parse_args
from training.nonfinite import NonFiniteGuard, state_is_finite

FLAGS = (
    "--steps", "50", "--batch-size", "1", "--grad-accum-steps", "1", "--seq-len", "8",
    "--dropout", "0", "--log-interval", "1000", "--no-curriculum-enabled",
    "--no-ema-enabled", "--mamba-chunk-len", "8", "--n-routed-experts", "2", "--moe-top-k", "1",
    "--d-model", "16", "--d-ff", "24",
)  # fmt: skip
POINTS = 500
BATCH_KINDS, STATE_KINDS = ("data", "loss", "gradient"), ("moment", "weight")
BAD_VALUES = (float("nan"), float("inf"), -float("inf"))


class Bench:
    """A trainer two steps in, with a checkpoint of that moment, that can be put back to it."""

    def __init__(self, directory):
        self.trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS)))
        self.trainer._open()
        for _ in range(2):
            assert self.trainer.attempt_step() is not None
        self.trainer.save(block=True)
        self.start = copy.deepcopy(self.trainer.state_dict())
        self.trainer.stream.next_batch()
        assert self.trainer.attempt_step() is not None
        self.after_next = self.weights()

    def put_back(self):
        trainer = self.trainer
        trainer.load_state_dict(copy.deepcopy(self.start))
        trainer.step, trainer.guard = 2, NonFiniteGuard()

    def weights(self):
        return {name: t.clone() for name, t in self.trainer.model.state_dict().items()}

    def moments(self):
        return [
            value
            for part in self.trainer.optimizer.parts
            for state in part.state.values()
            for value in state.values()
            if value.dim()
        ]

    def is_at_start(self):
        now, start = self.trainer.state_dict(), self.start
        return (
            self.trainer.step == 2
            and same(now["model"], start["model"])
            and same(now["optimizer"], start["optimizer"])
            and now["run"]["stream"] == start["run"]["stream"]
        )


def same(first, second):
    """Bit for bit, NaN included."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, torch.Tensor):
        one, two = first.detach().reshape(-1), second.detach().reshape(-1)
        return torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    return first == second


def poison_element(tensor, draw):
    tensor.data.view(-1)[draw.randrange(tensor.numel())] = draw.choice(BAD_VALUES)


def poison_batch(bench, kind, draw):
    """Spoil the next attempt; a function that ends the spoiling."""
    trainer, value = bench.trainer, draw.choice(BAD_VALUES)
    if kind == "data":

        def spoil(module, inputs, output):
            output = output.clone()
            output.view(-1)[draw.randrange(output.numel())] = value
            return output

        return trainer.model.embed.register_forward_hook(spoil).remove
    if kind == "gradient":
        parameter = draw.choice([p for p in trainer.model.parameters() if p.grad_fn is None])
        original = trainer.features.run

        def run(phase, ctx):
            original(phase, ctx)
            if phase == "before_optim":
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.view(-1)[draw.randrange(parameter.numel())] = value

        trainer.features.run = run
        return lambda: vars(trainer.features).pop("run")
    forward = trainer.forward

    def spoiled(ctx):
        forward(ctx)
        name = draw.choice(sorted(ctx.losses))
        ctx.losses[name] = ctx.losses[name] * value

    trainer.forward = spoiled
    return lambda: vars(trainer).pop("forward")


def survives_bad_batch(bench, kind, draw):
    """Whether a spoiled batch is left out and the step made of the next one."""
    bench.put_back()
    heal = poison_batch(bench, kind, draw)
    caught = bench.trainer.attempt_step() is None
    heal()
    unharmed = same(bench.weights(), bench.start["model"])
    trained = bench.trainer.attempt_step() is not None and bench.trainer.step == 3
    return (
        caught
        and unharmed
        and trained
        and same(bench.weights(), bench.after_next)
        and len(bench.trainer.guard.skipped) == 1
    )


def survives_damage(bench, kind, draw):
    """Whether spoiled weights or moments lead back to the checkpoint before anything is applied."""
    bench.put_back()
    if draw.random() < 0.5:  # damage a step later: there is something to lose
        assert bench.trainer.attempt_step() is not None
    tensors = bench.moments() if kind == "moment" else list(bench.trainer.model.parameters())
    poison_element(draw.choice(tensors), draw)
    caught = bench.trainer.attempt_step() is None
    return caught and bench.is_at_start() and bench.trainer.guard.skipped == []


@pytest.fixture
def bench(ram_path):
    bench = Bench(ram_path / "run")
    yield bench
    for part in bench.trainer._parts():
        part.close()


def survives(bench, kind, draw):
    trial = survives_bad_batch if kind in BATCH_KINDS else survives_damage
    return trial(bench, kind, draw)


@pytest.mark.parametrize("kind", BATCH_KINDS + STATE_KINDS)
def test_every_point_is_caught_within_its_step(bench, kind):
    draw, count = random.Random(kind), POINTS // len(BATCH_KINDS + STATE_KINDS)
    assert sum(survives(bench, kind, draw) for _ in range(count)) == count
    assert bool(state_is_finite(bench.trainer.model, bench.trainer.optimizer))


def test_without_a_look_at_the_state_damage_gets_through(bench, monkeypatch):
    """Negative control: loss and gradient alone miss a good part of it."""
    for module in (training.sigma_trainer, training.weight_update):
        monkeypatch.setattr(module, "state_is_finite", lambda *args: torch.tensor(True))
    draw = random.Random(0)
    missed = [kind for kind in STATE_KINDS * 20 if not survives_damage(bench, kind, draw)]
    assert len(missed) > 10


def test_without_a_judge_bad_batches_reach_the_weights(bench, monkeypatch):
    """Negative control of the other kinds."""
    real = torch.isfinite
    monkeypatch.setattr(
        training.sigma_trainer.torch, "isfinite", lambda t: torch.ones_like(real(t))
    )
    draw = random.Random(0)
    assert not any(survives_bad_batch(bench, kind, draw) for kind in BATCH_KINDS * 5)


def test_damage_between_the_update_and_the_save_is_not_saved(ram_path):
    """Caught at the save itself, although no further step would have seen it."""
    directory = ram_path / "run"
    flags = (*FLAGS, "--steps", "6", "--save-interval", "3")
    trainer = build_trainer(parse_args(tiny_flags(directory, *flags)))
    attempt, spoiled = trainer.attempt_step, []

    def attempt_and_spoil():
        ctx = attempt()
        if trainer.step == 6 and not spoiled:
            spoiled.append(trainer.step)
            trainer.model.embed.weight.data[7, 3] = float("nan")
        return ctx

    trainer.attempt_step = attempt_and_spoil
    trainer.fit()
    assert spoiled == [6] and trainer.step == 6 and trainer.guard.rollbacks == 1
    reference = build_trainer(parse_args(tiny_flags(ram_path / "plain", *flags)))
    reference.fit()
    assert same(trainer.model.state_dict(), reference.model.state_dict())
