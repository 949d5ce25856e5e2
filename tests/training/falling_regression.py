"""A stationary problem with a best learning rate: SGD on a regression that can be solved exactly.

The loss is in nats of a normal error whose variance is fitted, half the log of the mean square, so
with fresh rows at every step it falls at the same mean rate for ever. The rate is best at
`best_rate` (the mean of the square shrinks by (1 - lr)^2 + lr^2 (d + 1) / B per step).
"""

import math

import numpy as np
import torch

from training.self_improver import ImproverSettings, SelfImprover

SIZE = 32


def best_rate(batch):
    return 1.0 / (1.0 + (SIZE + 1) / batch)


class FallingRegression:
    def __init__(self, *, seed, batch):
        self.rng = np.random.default_rng(seed)
        self.batch = batch
        self.error = self.rng.standard_normal(SIZE)
        self.probes = self.rng.standard_normal((16, 64, SIZE))
        self.log_size = 0.0

    def step(self, rate):
        rows = self.rng.standard_normal((self.batch, SIZE))
        self.error = self.error - rate * rows.T @ (rows @ self.error) / self.batch
        size = float(np.linalg.norm(self.error))
        self.error /= size
        self.log_size += math.log(size)

    def loss(self, number):
        rows = self.probes[number % 16]
        return 0.5 * math.log(float(np.mean((rows @ self.error) ** 2))) + self.log_size


def improve(base, *, seed, batch, quadruples, has_effect=True, interval=2, **settings):
    """Search from the learning rate `base`: the searcher at its end, and the loss it reached."""
    problem = FallingRegression(seed=seed, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    search = SelfImprover(ImproverSettings(**settings), knobs=("lr",))
    for number in range(quadruples):
        search.begin(problem.loss(number), generator=generator)
        while search.is_running:
            for _ in range(interval):
                problem.step(base * (search.factors["lr"] if has_effect else 1.0))
            search.end_trial(problem.loss(number), generator=generator)
    return search, problem.log_size
