"""One update of the policy: objectives, penalties, their mix, and an optimizer of their own.

Why an optimizer of its own. The moments of the language model's optimizer hold gradients of text; a
step of it after an RL backward would apply them a second time, and a step of Muon has the same
length however small the gradient, so a group that says almost nothing would move the weights as far
as a batch of text. Here AdamW (no decay) keeps moments of policy gradients only. Adam does not see
a factor on its loss either, so the weight of a tick scales the step.

The loss is formed on log-probabilities that are leaves, and their gradients are then taken through
the model, `rows` completions at a time: what the loss averages over does not depend on how many fit
into memory.

The KL penalty is to a hard copy of the weights of at most 64 ticks ago, not to an average: averages
of latent ternary weights have other codes than any of the weights they are averages of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.optim.adamw import AdamW
from training.optimizer import OptimizerSet, expert_parameters
from training.rl.auto_mix import balanced_loss
from training.rl.objectives import ClipSettings, entropy_bonus, kl_penalty, policy_loss
from training.rl.rollout import Rollout, completion_hidden, head_log_probs

BETAS = (0.9, 0.95)
REFERENCE_TICKS = 64
SAME_DIRECTION = 1e-6


@dataclass(slots=True, kw_only=True, frozen=True)
class UpdateSettings:
    """main: the objective that sets the scale. lr: of AdamW. max_norm: of the gradient."""

    main: str
    clip: ClipSettings
    lr: float
    entropy_weight: float
    kl_weight: float
    dispo_temperature: float = 1.0
    max_norm: float = 1.0


@dataclass(slots=True, kw_only=True)
class PolicyBatch:
    """Completions, the advantage (N,) of each, and the objectives that read them."""

    rollout: Rollout
    advantages: Tensor
    modes: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class UpdateReport:
    """What one update did. applied: weights were moved, by a policy gradient above zero.

    policy_norm: of the policy term's gradient in the log-probabilities; grad_norm: of the whole
    loss in the parameters, before clipping. mixed: the objectives together point elsewhere than
    the main one alone.
    """

    applied: bool = False
    mixed: bool = False
    policy_norm: float = 0.0
    grad_norm: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    ratio: float = 1.0
    clip_fraction: float = 0.0
    components: dict[str, float] = field(default_factory=dict)


class PolicyUpdate:
    """The optimizer of RL and the reference snapshot of one model."""

    def __init__(
        self,
        model: Any,
        settings: UpdateSettings,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.settings = settings
        self.rows: int | None = None  # completions per forward, None = all
        self.num_ticks = 0
        self._autocast = autocast
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        group = {
            "params": [param for _, param in named],
            "param_names": [name for name, _ in named],
        }
        self._adamw = AdamW([group], lr=settings.lr, betas=BETAS, weight_decay=0.0)
        self._adamw.watch_stacks(expert_parameters(model))
        self._optimizer = OptimizerSet([self._adamw])
        self.reference: Any = None
        if settings.kl_weight > 0.0:
            self.reference = copy.deepcopy(model).requires_grad_(False)

    @property
    def optimizer(self) -> AdamW:
        """What moves the weights, for a back end that makes its own gradients."""
        return self._adamw

    def begin_tick(self) -> None:
        """Count a tick; every 64th takes the weights as the new reference."""
        if self.reference is not None and self.num_ticks % REFERENCE_TICKS == 0:
            self.reference.load_state_dict(self.model.state_dict())
        self.num_ticks += 1

    @torch.enable_grad()
    def step(
        self, batches: Sequence[PolicyBatch], *, blend: Mapping[str, float], weight: float
    ) -> UpdateReport:
        """One step on the blend of the objectives, `weight` times as long as --sigma-rl-lr.

        Nothing moves without a policy gradient above zero, nor on a gradient that is not finite.
        """
        report = UpdateReport()
        parts = [_Scored(self, batch) for batch in batches]
        losses: dict[str, Tensor] = {}
        leaves: dict[str, list[Tensor]] = {}
        for part in parts:
            losses |= part.policy_losses(report)
            leaves |= dict.fromkeys(part.batch.modes, part.leaves)
        blend = {mode: blend[mode] for mode in losses}
        policy, _ = balanced_loss(losses, log_probs=leaves, blend=blend, main=self.settings.main)
        every = [leaf for part in parts for leaf in part.leaves]
        gradient = torch.autograd.grad(policy, every, retain_graph=True, allow_unused=True)
        report.policy_norm = float(_norm(gradient))
        report.components = {mode: float(loss.detach()) for mode, loss in losses.items()}
        if report.policy_norm == 0.0:
            return report
        report.mixed = len(losses) > 1 and self._differs(losses, every, gradient)
        total = policy + torch.stack([part.penalty(report) for part in parts]).mean()
        report.loss = float(total.detach())
        total.backward()
        for part in parts:
            part.backward()
        report.applied = self._apply(report, weight=weight)
        return report

    def _differs(
        self, losses: Mapping[str, Tensor], leaves: list[Tensor], mixed: Sequence[Tensor | None]
    ) -> bool:
        """Whether the mixed gradient has another direction than the main objective's."""
        if self.settings.main not in losses:
            return True
        alone = torch.autograd.grad(
            losses[self.settings.main], leaves, retain_graph=True, allow_unused=True
        )
        first, second = (_flat(grads, leaves) for grads in (alone, mixed))
        return bool(1.0 - F.cosine_similarity(first, second, dim=0) > SAME_DIRECTION)

    def _apply(self, report: UpdateReport, *, weight: float) -> bool:
        parameters = list(self._optimizer.parameters())
        report.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.max_norm))
        finite = report.grad_norm < float("inf")  # false for NaN as well
        if finite:
            for group in self._optimizer.param_groups:
                group["lr"] = self.settings.lr * weight
            self._optimizer.step()
        self._optimizer.zero_grad()
        return finite

    def forget_gradients(self) -> None:
        """After a step that found no memory."""
        self._optimizer.zero_grad()

    def score(self, model: Any, rollout: Rollout) -> list[Tensor]:
        """Log-probabilities and entropies (N, C), and with a DISPO temperature the former at it."""
        with self._autocast():
            hidden = completion_hidden(model, rollout)
            values = list(head_log_probs(model, rollout, hidden))
            if self.settings.dispo_temperature != 1.0:
                values.append(
                    head_log_probs(
                        model, rollout, hidden, temperature=self.settings.dispo_temperature
                    )[0]
                )
        return values

    def state_dict(self) -> dict[str, Any]:
        """Moments by parameter name, the reference, the ticks so far, and the rows that fit."""
        reference = {} if self.reference is None else self.reference.state_dict()
        return {
            "optimizer": self._optimizer.state_dict(),
            "reference": dict(reference),
            "num_ticks": self.num_ticks,
            "rows": self.rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over optimizer, reference and counts; ValueError for an optimizer of other
        parameters."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            # A run that had no penalty before starts from the weights it has now.
            self.reference.load_state_dict(state["reference"] or self.model.state_dict())
        self.num_ticks, self.rows = state["num_ticks"], state["rows"]


class _Scored:
    """A batch with its log-probabilities as leaves, and the way back into the model."""

    def __init__(self, update: PolicyUpdate, batch: PolicyBatch) -> None:
        self.batch = batch
        self._update = update
        size, rows = len(batch.rollout), update.rows or len(batch.rollout)
        chunks = [range(start, min(start + rows, size)) for start in range(0, size, rows)]
        self._parts = (
            [batch.rollout] if len(chunks) == 1 else list(map(batch.rollout.select, chunks))
        )
        self._graphs: list[list[Tensor]] = []
        scored = []
        for part in self._parts:
            with torch.set_grad_enabled(len(self._parts) == 1):
                scored.append(update.score(update.model, part))
        if len(self._parts) == 1:
            self._graphs = scored
        self._values = [
            torch.cat([self._padded(item) for item in column]).detach().requires_grad_()
            for column in zip(*scored)
        ]
        self._reference = self._reference_log_probs() if update.settings.kl_weight > 0.0 else None

    @property
    def leaves(self) -> list[Tensor]:
        """What policy terms are computed from."""
        return [self._values[0], *self._values[2:]]

    def policy_losses(self, report: UpdateReport) -> dict[str, Tensor]:
        """Loss of each objective, 0-d, to be minimised."""
        rollout, found = self.batch.rollout, {}
        for mode in self.batch.modes:
            term = policy_loss(
                mode,
                log_probs=self._values[0],
                old_log_probs=rollout.old_log_probs,
                advantages=self.batch.advantages,
                mask=rollout.completion_mask,
                clip=self._update.settings.clip,
                scored=self._values[2] if mode == "dispo" and len(self._values) > 2 else None,
            )
            found[mode] = term.loss
            if mode == self._update.settings.main:
                report.ratio = float(term.ratio_mean)
                report.clip_fraction = float(term.clip_fraction)
        return found

    def penalty(self, report: UpdateReport) -> Tensor:
        """Weighted KL to the reference minus weighted entropy, 0-d."""
        settings, mask = self._update.settings, self.batch.rollout.completion_mask
        entropy = entropy_bonus(self._values[1], mask)
        total = -settings.entropy_weight * entropy
        report.entropy = float(entropy.detach())
        if self._reference is not None:
            kl = kl_penalty(self._values[0], self._reference, mask)
            total = total + settings.kl_weight * kl
            report.kl = float(kl.detach())
        return total

    def backward(self) -> None:
        """The leaves' gradients through the model, part by part."""
        first = 0
        for number, part in enumerate(self._parts):
            graph = (
                self._graphs[number]
                if self._graphs
                else self._update.score(self._update.model, part)
            )
            last = first + len(part)
            pairs = [
                (value, leaf.grad[first:last, : value.shape[1]])
                for value, leaf in zip(graph, self._values)
                if leaf.grad is not None
            ]
            torch.autograd.backward([v for v, _ in pairs], [grad for _, grad in pairs])
            first = last

    def _reference_log_probs(self) -> Tensor:
        with torch.no_grad():
            parts = [self._update.score(self._update.reference, p)[0] for p in self._parts]
        return torch.cat([self._padded(part) for part in parts])

    def _padded(self, values: Tensor) -> Tensor:
        return F.pad(values, (0, self.batch.rollout.completion_mask.shape[1] - values.shape[1]))


def _norm(gradients: Sequence[Tensor | None]) -> Tensor:
    squares = [grad.double().square().sum() for grad in gradients if grad is not None]
    return torch.stack(squares).sum().sqrt()


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(leaf) if grad is None else grad).flatten().double()
            for grad, leaf in zip(gradients, like)
        ]
    )
