"""First-order and randomised credit rank the blocks of a real model as leaving them out does."""

import pytest
import torch
from scipy.stats import spearmanr

from tests.training.credit_models import (
    as_batch,
    backward,
    c3o_for,
    chain_batch,
    small_model,
    train_step,
)
from training.credit import UpdateTrial, leave_one_block_out, masked_credit
from training.probe import Probe

WARM_UP = 40
SEEDS, PROBES = (0, 1, 2), 4


class Trained:
    """A model in the middle of its training, and one more update under a probe."""

    def __init__(self, **settings):
        self.model = small_model(**settings)
        # A gain of 0 leaves the trajectory alone, so the three probes see plain updates.
        self.optimizer = c3o_for(self.model, block_size=2048, credit_gain=0.0)
        self.generator = torch.Generator().manual_seed(3)
        for _ in range(WARM_UP):
            self.step()

    def step(self):
        train_step(self.model, self.optimizer, chain_batch(self.generator, rows=8))

    def probe(self, number):
        """First-order credit of one more update, and the trial of it on the same probe batch."""
        control, model = self.optimizer.control, self.model
        # On little text the exact credit is mostly jumps: of roundings, and of tokens that go to
        # other experts.
        held_out = chain_batch(torch.Generator().manual_seed(100 + number), rows=64)
        probe = Probe([held_out], device=torch.device("cpu"))
        params = [p for part in control.parts for g in part.param_groups for p in g["params"]]
        before = [param.detach().clone() for param in params]
        control.begin_probe()
        self.step()
        _, gradients = probe.gradient(model, held_out)
        first = control.finish_probe(
            gradients, evaluate=lambda: probe.loss(model, held_out), generator=self.generator
        )
        steps = [old - param.detach() for old, param in zip(before, params)]
        trial = UpdateTrial(
            params,
            steps,
            layout=control._layout,
            evaluate=lambda: probe.loss(model, held_out),
        )
        return first, trial


def ranks(trained):
    """Rank correlations of first-order and exact credit by probe; the last of both credits."""
    found, first, exact = [], torch.empty(0), torch.empty(0)
    for number in range(PROBES):
        first, trial = trained.probe(number)
        exact = leave_one_block_out(trial, num_blocks=len(first), device=torch.device("cpu"))
        found.append(spearmanr(first, exact)[0])
    return found, first, exact


def test_first_order_credit_ranks_blocks_of_the_default_network_as_leaving_them_out():
    """Ternary weights, int8 activations, experts. Means of the seeds: 0.53 to 0.65."""
    found = []
    for seed in SEEDS:
        own, first, exact = ranks(Trained(seed=seed))
        found += own
        # Negative control: the credit of other blocks says nothing.
        shuffled = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(0))]
        assert abs(spearmanr(shuffled, exact)[0]) < 0.5
    assert sum(found) / len(found) > 0.5, found


def test_without_rounding_and_routing_it_is_nearly_exact():
    """Nothing jumps then, and what is left is curvature."""
    found, _, _ = ranks(Trained(quant_mode="none", experts=0))
    assert sum(found) / len(found) > 0.95, found


def test_randomised_credit_ranks_blocks_as_leaving_them_out():
    first, trial = Trained().probe(9)
    exact = leave_one_block_out(trial, num_blocks=len(first), device=torch.device("cpu"))
    masked, error = masked_credit(
        trial.loss,
        num_blocks=len(first),
        draws=400,
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
        probability=0.2,
    )
    assert spearmanr(masked, exact)[0] > 0.5
    assert bool((error > 0).all())


@pytest.mark.parametrize("is_noise", [True, False])
def test_blocks_fed_with_label_noise_get_a_factor_below_one(is_noise):
    """The gradient of one weight comes from shuffled labels, of all others from the true ones; the
    control feeds it with the true ones as well."""
    model = small_model()
    optimizer = c3o_for(model, block_size=2048)
    control = optimizer.control
    victim = dict(model.named_parameters())["embed.weight"]
    generator = torch.Generator().manual_seed(5)
    held_out = [chain_batch(torch.Generator().manual_seed(50 + n), rows=8) for n in range(4)]
    probe = Probe(held_out, device=torch.device("cpu"))
    for step in range(40):
        batch = chain_batch(generator, rows=8)
        noise = batch.labels.flatten()[torch.randperm(batch.labels.numel(), generator=generator)]
        labels = noise.view_as(batch.labels) if is_noise else batch.labels
        backward(model, as_batch(batch.input_ids, labels))
        planted = victim.grad.clone()
        optimizer.zero_grad()
        model.discard_step()
        backward(model, batch)
        victim.grad.copy_(planted)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        control.begin_probe()
        optimizer.step()
        model.after_optimizer_step()
        optimizer.zero_grad()
        if step % 4 == 0:
            _, gradients = probe.gradient(model, probe.batch(step // 4))
            control.finish_probe(gradients, evaluate=lambda: torch.zeros(()), generator=generator)
    assert (float(control.scales_of(victim).max()) < 1.0) == is_noise
