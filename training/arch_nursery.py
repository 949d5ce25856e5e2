"""The networks of an architecture search: made, grown, trained for a share, judged on probe text.

A candidate is at rest a few dictionaries of host tensors (weights, optimizer state, average) and
the position of its data stream. A trial builds the network, trains it and puts it to rest again,
so a dozen candidates need the memory of one, and what is saved is what is used. All candidates
read the same text in the same order, each from where its lineage stopped.

The learning rate is that of the plateau: how long a lineage will train is not known beforehand.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evolution.fractal_nas import Cost
from evolution.genome import Genome, Mutation, forward_flops
from evolution.morphs import grow_average, grow_moments, grow_weights, part_copies, plan_morph
from model.bitlinear import ternarize
from model.config import SigmaModelConfig
from model.engram import merge_canonical_ids
from model.sigma_llm import SigmaLLM
from training.config.sections import OptimConfig
from training.ema import WeightAverage
from training.instant import apply_instant
from training.micro_batch import move_batch
from training.optimizer import OptimizerSet, build_optimizer
from training.probe import Probe
from training.stream.batch import BatchStream
from training.weight_update import apply_gradients

TRAINING_FACTOR = 3  # a backward pass costs two forward passes
LATENCY_REPEATS = 5
TRITS_PER_BYTE = 5
DENSE_BYTES = 2  # of what is not ternary, in bf16; a scale as well


@dataclass(slots=True, kw_only=True)
class NurserySettings:
    """steps: of the optimizer, counted per candidate; average_decay: None keeps no average.

    pieces: text of every token, for --engram-canonical.
    """

    base: SigmaModelConfig
    optim: OptimConfig
    seed: int
    seq_len: int
    batch_size: int
    grad_accum_steps: int
    average_decay: float | None = None
    kernel_backend: str = "torch"
    scan_blocks: tuple[int, int] = (0, 0)
    pieces: Sequence[str] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size * self.grad_accum_steps


@dataclass(slots=True, kw_only=True)
class _Specimen:
    """A candidate at rest. average: None without one; stream: its position, {} at the start."""

    genome: Genome
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None
    stream: dict[str, Any]
    steps: int


class ModelNursery:
    """Real networks for `evolution.fractal_nas.FractalSearch`."""

    def __init__(
        self,
        settings: NurserySettings,
        *,
        stream: BatchStream,
        probe: Probe,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._settings = settings
        self.base = settings.base
        self._stream = stream
        self._start = stream.state_dict()
        self._probe = probe
        self._device = device
        self._autocast = autocast
        self._specimens: dict[int, _Specimen] = {}
        self._costs: dict[Genome, Cost] = {}

    def found(self, number: int, genome: Genome) -> None:
        """A new network; one genome and seed always give the same."""
        model = self._build(genome)
        self._specimens[number] = _Specimen(
            genome=genome,
            weights=_at_rest(model.state_dict()),
            optimizer=self._optimizer(model).state_dict(),
            average=None,
            stream=dict(self._start),
            steps=0,
        )

    def grow(self, number: int, parent: int, genome: Genome, mutation: Mutation) -> None:
        """The parent's network, optimizer state and average after a mutation."""
        origin = self._specimens[parent]
        child = self._build(genome.mutated(mutation))
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + number)
        fresh = _at_rest(child.state_dict())
        carries = plan_morph(genome, mutation, self.base, names=fresh, generator=generator)
        weights = grow_weights(carries, origin.weights, fresh)
        part_copies(
            carries,
            weights,
            ternary=ternary_names(child),
            codes_of=lambda weight: ternarize(weight, self.base.bitlinear_group_size)[0],
            generator=generator,
        )
        shapes = {name: tensor.shape for name, tensor in origin.weights.items()}
        average = origin.average
        self._specimens[number] = _Specimen(
            genome=genome.mutated(mutation),
            weights=weights,
            optimizer=grow_moments(carries, origin.optimizer, shapes),
            average=None if average is None else grow_average(carries, average, weights),
            stream=dict(origin.stream),
            steps=origin.steps,
        )

    def train(self, number: int, *, flops: float) -> tuple[float, float]:
        """Whole steps, one at least; the probe loss in nats per token, and what they took."""
        specimen, settings = self._specimens[number], self._settings
        per_step = TRAINING_FACTOR * self.cost(specimen.genome).flops * settings.tokens_per_step
        steps = max(1, round(flops / per_step))
        model = self._load(specimen).train()
        apply_instant(model)
        optimizer = self._optimizer(model)
        optimizer.load_state_dict(specimen.optimizer)
        # Dropout draws from torch's shared stream: from here on it is this trial's own.
        torch.manual_seed(
            random.Random(f"{settings.seed} {number} {specimen.steps}").getrandbits(62)
        )
        average = self._average(specimen)
        self._stream.load_state_dict(specimen.stream)
        for _ in range(steps):
            self._step(model, optimizer, step=specimen.steps + 1)
            specimen.steps += 1
            if average is not None:
                average.update(model)
        specimen.weights = _at_rest(model.state_dict())
        specimen.optimizer = optimizer.state_dict()
        specimen.average = None if average is None else _at_rest(average.shadow)
        specimen.stream = self._stream.state_dict()
        return self._judge(model), float(steps * per_step)

    def cost(self, genome: Genome) -> Cost:
        if genome not in self._costs:
            network = genome.network(self.base)
            self._costs[genome] = Cost(
                flops=forward_flops(network, seq_len=self._settings.seq_len),
                bytes=packed_bytes(self._build(genome)),
            )
        return self._costs[genome]

    def forget(self, number: int) -> None:
        del self._specimens[number]

    def average_loss(self, number: int) -> float | None:
        """Probe loss of a candidate's averaged weights; None without an average."""
        specimen = self._specimens[number]
        if specimen.average is None:
            return None
        model = self._load(specimen)
        model.load_state_dict(specimen.average, strict=False)
        return self._judge(model)

    def weights(self, number: int) -> dict[str, Tensor]:
        """A living candidate's network, by name."""
        return self._specimens[number].weights

    def genome(self, number: int) -> Genome:
        """KeyError for a candidate that was never made, or forgotten."""
        return self._specimens[number].genome

    def latency_us(self, genome: Genome) -> float:
        """Median microseconds of a forward pass of one row: reported, never decided by."""
        model = self._build(genome).to(self._device).eval()
        tokens = torch.zeros(1, self._settings.seq_len, dtype=torch.int64, device=self._device)
        times = []
        with torch.no_grad(), self._autocast():
            for _ in range(LATENCY_REPEATS + 1):
                start = self._now()
                model(tokens)
                times.append(1e6 * (self._now() - start))
        return statistics.median(times[1:])

    def state_dict(self) -> dict[str, Any]:
        """Every network at rest by its number: the host tensors themselves, no copies of them."""
        return {
            str(number): {
                "genome": specimen.genome.to_list(),
                "weights": specimen.weights,
                "optimizer": specimen.optimizer,
                "average": specimen.average,
                "stream": specimen.stream,
                "steps": specimen.steps,
            }
            for number, specimen in self._specimens.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all networks; nothing is built before its next trial."""
        self._specimens = {
            int(number): _Specimen(**values | {"genome": Genome.from_list(values["genome"])})
            for number, values in state.items()
        }

    def close(self) -> None:
        """Close the stream that all candidates read."""
        self._stream.close()

    def _build(self, genome: Genome) -> SigmaLLM:
        model = SigmaLLM(genome.network(self.base), seed=self._settings.seed)
        own = self._settings
        if model.config.engram_canonical:
            merge_canonical_ids(model, own.pieces)
        model.use_kernels(own.kernel_backend, scan_blocks=own.scan_blocks)
        return model

    def _load(self, specimen: _Specimen) -> SigmaLLM:
        model = self._build(specimen.genome)
        model.load_state_dict(specimen.weights)
        return model.to(self._device)

    def _optimizer(self, model: nn.Module) -> OptimizerSet:
        return build_optimizer(model, self._settings.optim, seed=self._settings.seed)

    def _average(self, specimen: _Specimen) -> WeightAverage | None:
        if self._settings.average_decay is None:
            return None
        average = WeightAverage(decay=self._settings.average_decay)
        average.shadow = {
            name: tensor.to(self._device) for name, tensor in (specimen.average or {}).items()
        }
        return average

    def _step(self, model: SigmaLLM, optimizer: OptimizerSet, *, step: int) -> None:
        """One optimizer step; one that is not finite changes nothing, as in training."""
        settings = self._settings
        warmup = settings.optim.warmup_steps
        optimizer.set_schedule(lr_factor=min(1.0, step / max(1, warmup)), decay_factor=1.0)
        losses = []
        for _ in range(settings.grad_accum_steps):
            batch = move_batch(self._stream.next_batch(), self._device)
            with self._autocast():
                output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
            loss = torch.stack([output.loss, *output.aux.values()]).float().sum()
            (loss / settings.grad_accum_steps).backward()
            losses.append(loss.detach())
        outcome = apply_gradients(
            model,
            optimizer,
            scaler=torch.amp.GradScaler(self._device.type, enabled=False),
            max_norm=settings.optim.grad_clip,
            loss=torch.stack(losses).mean(),
        )
        if not outcome.finite:
            model.discard_step()
        optimizer.zero_grad()

    def _judge(self, model: SigmaLLM) -> float:
        losses = [self._probe.loss(model, self._probe.batch(n)) for n in range(len(self._probe))]
        return float(torch.stack(losses).double().mean())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def ternary_names(model: SigmaLLM) -> list[str]:
    """Names of the ternary weights in the model's state."""
    state = model.state_dict()
    return [name if name in state else f"{name}.weight" for name in model.ternary_weights()]


def packed_bytes(model: SigmaLLM) -> int:
    """Bytes of the network as stored: five ternary weights a byte, two bytes for the rest."""
    ternary = {name: tensor for name, (tensor, _) in model.ternary_weights().items()}
    group = model.config.bitlinear_group_size
    codes = sum(-(-tensor.numel() // TRITS_PER_BYTE) for tensor in ternary.values())
    scales = sum(
        tensor.numel() // tensor.shape[-1] * _num_groups(tensor.shape[-1], group)
        for tensor in ternary.values()
    )
    dense = sum(_elements(model.parameters())) - sum(_elements(ternary.values()))
    return codes + DENSE_BYTES * (scales + dense)


def _num_groups(width: int, group: int) -> int:
    return -(-width // group) if 0 < group < width else 1


def _elements(tensors: Iterable[Tensor]) -> Iterable[int]:
    return (tensor.numel() for tensor in tensors)


def _at_rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory. A tied head shares its tensor with the embedding and stays so."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
