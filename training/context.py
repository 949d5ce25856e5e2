"""What one training step offers to its features.

A feature sees this value and nothing else: not the trainer, not the other features, not the config
tree. What it may change in which phase is written in `training/features/base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.hydra_service import HydraService
from training.probe import Probe
from training.replay.causal_replay import CausalReplay
from training.rl_service import RLService
from training.run_policy import RunPolicy
from training.stream.batch import Batch
from training.stream.mixture import Mixture

Metric = float | Tensor | Callable[[], float | Tensor]


@dataclass(slots=True, kw_only=True)
class StepContext:
    """State of one optimizer step while it runs.

    step: 1-based number of the optimizer step in progress.
    total_steps: length of the run in steps.
    micro: index of the micro-batch inside the step.
    batch: the micro-batch on the training device.
    outputs: the model's output for it, set after the forward.
    losses, weights: scalar loss terms of this micro-batch by name, and the factor of each.
    train_loss: mean LM loss of the micro-batches so far, in nats per token.
    grad_norm: global gradient norm before clipping, set by the update.
    optimizer: what `update` will step.
    mixture: the draws between the stream's sources; None when it has but one text.
    probe: text of the training split that is never trained on; None when nothing asks for it.
    rl: the learner from rewards; None when there is none.
    replay: of completions that passed; None without it.
    trials: of overlays over the configuration (training/overlay_trials.py); None without them.
    hydra: the adapters per domain; None without them.
    policy: what controllers change between steps, by factors, and the token of experiments.
    span: charges the block to a span of the clock that is not one of training.
    rng: generator of the feature that is being called, derived from the seed and its name.
    """

    step: int
    total_steps: int
    model: Any  # a SigmaLLM; types of nn.Module do not know its methods
    optimizer: Any
    mixture: Mixture | None = None
    probe: Probe | None = None
    rl: RLService | None = None
    replay: CausalReplay | None = None
    trials: Any = None
    hydra: HydraService | None = None
    policy: RunPolicy = field(default_factory=RunPolicy)
    span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    rng: torch.Generator | None = None
    micro: int = 0
    batch: Batch | None = None
    outputs: Any = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    train_loss: Tensor | None = None
    grad_norm: Tensor | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)

    def log(self, name: str, value: Metric) -> None:
        """Put a value into this step's row; tensors are read, functions called, if it is logged."""
        self.metrics[name] = value

    def total_loss(self) -> Tensor:
        """Weighted sum of all loss terms of the micro-batch (weight 1 where none was given)."""
        terms = [self.weights.get(name, 1.0) * loss for name, loss in self.losses.items()]
        return torch.stack([term.float() for term in terms]).sum()
