"""`--mode plan`: will it fit, how fast is it, when is it done? Measured, not guessed.

Builds the real model and optimizer on the real device and runs a few real steps on random tokens
(the speed does not depend on which). With RL it makes two ticks as well, on drawn rewards: they
cost what earned ones do, and an untrained model earns none. Writes nothing.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.sigma_llm import SigmaLLM
from training.build import build_autocast, build_forward, build_model, build_optimizer
from training.build_data import build_tokenizer
from training.build_hydra import hydra_settings
from training.build_rl import build_learner
from training.config.sigma_config import SigmaConfig
from training.features.instant import instant_settings
from training.hydra.domain import Domain
from training.instant import apply_instant, instant_memory
from training.modes.doctor import check_memory
from training.runtime.directories import free_bytes
from training.runtime.environment import GIB, EnvironmentProblem, configure_threads, resolve_device
from training.runtime.text import format_duration
from training.tokenizer import Tokenizer

MEASURED_STEPS = 3
LESS = "lower --batch-size (and raise --grad-accum-steps), --seq-len or the model's size"
MIB = 2**20


@dataclass(slots=True, kw_only=True)
class Plan:
    """What a run costs. Bytes unless the name says otherwise.

    activation_bytes: what one micro-batch keeps for its backward pass. peak_bytes: the device
    allocator's maximum, None on a CPU. micro_step_s: forward and backward of one micro-batch, each
    measured. optimizer_step_s: clip, update and bookkeeping. rl_bytes: what RL keeps, the moments
    of its own optimizer and the reference weights; rl_tick_s: of one tick, by this model as it is
    (of TRL's step, which takes its place, not measured). hydra_bytes: all adapters, their moments,
    best versions and the merged one; its pairs are small. Evaluation, saving and Hydra's updates,
    gates and merges take time on top.
    """

    device: str
    parameters_total: int
    parameters_active: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    rl_bytes: int
    hydra_bytes: int
    activation_bytes: int
    peak_bytes: int | None
    micro_step_s: list[float]
    optimizer_step_s: list[float]
    rl_tick_s: float
    step_s: float
    tokens_per_step: int
    tokens_per_s: float
    steps: int
    total_tokens: int
    total_s: float
    checkpoint_bytes: int
    checkpoints_bytes: int
    disk_free_bytes: int


def run(config: SigmaConfig) -> int:
    """Measure and print. EnvironmentProblem when the run does not fit on the device, and before
    anything is built when weights and their like alone do not."""
    configure_threads()
    device = resolve_device(config)
    memory = check_memory(config)
    if memory.status == "fail":  # a CPU would swap, not refuse
        raise EnvironmentProblem(f"this run does not fit on {device}: {memory.found}", LESS)
    try:
        plan = measure(config, device)
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"this run does not fit on {device}: {str(error).partition('. ')[0]}", LESS
        ) from None
    if config.run.json:
        print(json.dumps(asdict(plan)))
    else:
        print_plan(plan)
    return 0


def measure(config: SigmaConfig, device: torch.device) -> Plan:
    """Build, warm up with one step that also counts activations, then time three steps."""
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer, device).train()
    apply_instant(model, instant_settings(config))
    optimizer = build_optimizer(config, model)
    stepper = _Stepper(config, model=model, optimizer=optimizer, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with SavedTensors(model) as saved:
        stepper.forward_backward()
    compressed = instant_memory(model).finish_step().compressed_bytes
    gradient_bytes = sum(_size(p.grad) for p in model.parameters() if p.grad is not None)
    stepper.update()
    times = [(stepper.forward_backward(), stepper.update()) for _ in range(MEASURED_STEPS)]
    micro, update = [pair[0] for pair in times], [pair[1] for pair in times]

    counts, run_config, data = model.num_parameters(), config.run, config.data
    weights = sum(_size(tensor) for tensor in [*model.parameters(), *model.buffers()])
    average = sum(_size(p) for p in model.parameters()) if config.ema.enabled else 0
    moments = sum(map(_size, _tensors(optimizer.state_dict())))
    rl_bytes, rl_tick_s = measure_rl(config, model, tokenizer)
    hydra_bytes = measure_hydra(config, model)
    checkpoint = sum(map(_size, _tensors(model.state_dict())))
    checkpoint += moments + average + rl_bytes + hydra_bytes
    step_s = data.grad_accum_steps * statistics.median(micro) + statistics.median(update)
    step_s += rl_tick_s / max(1, config.ttrl.interval)
    tokens = data.batch_size * data.seq_len * data.grad_accum_steps
    return Plan(
        device=_device_name(device),
        parameters_total=counts["total"],
        parameters_active=counts["active"],
        weight_bytes=weights,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=moments,
        average_bytes=average,
        rl_bytes=rl_bytes,
        hydra_bytes=hydra_bytes,
        activation_bytes=saved.num_bytes + compressed,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        micro_step_s=micro,
        optimizer_step_s=update,
        rl_tick_s=rl_tick_s,
        step_s=step_s,
        tokens_per_step=tokens,
        tokens_per_s=tokens / step_s,
        steps=run_config.steps,
        total_tokens=tokens * run_config.steps,
        total_s=step_s * run_config.steps,
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=checkpoint * (run_config.max_checkpoints + 1),
        disk_free_bytes=free_bytes(Path(run_config.checkpoint_dir)),
    )


def measure_rl(config: SigmaConfig, model: SigmaLLM, tokenizer: Tokenizer) -> tuple[int, float]:
    """Bytes that RL keeps beside the model, and seconds of a tick; zeros without RL."""
    if not config.ttrl.interval:
        return 0, 0.0
    own = copy.deepcopy(config)
    own.sigma_rl.sigma_rl_placebo = "random"
    own.grpo.backend = "internal"
    learner = build_learner(own, model, tokenizer)
    try:
        learner.tick(seed=0)
        start = _now(model.embed.weight.device)
        learner.tick(seed=1)
        seconds = _now(model.embed.weight.device) - start
    finally:
        learner.close()
    return sum(map(_size, _tensors(learner.update.state_dict()))), seconds


def measure_hydra(config: SigmaConfig, model: SigmaLLM) -> int:
    """Bytes that Hydra keeps beside the model once every domain has a best version; 0 without it.

    One domain's are measured after a step that changes nothing: all have the same layers.
    """
    if not config.hydra.enable:
        return 0
    settings = hydra_settings(config)
    domain = Domain(model, settings.adapter, gate=settings.gate, seed=config.run.seed)
    for factor in domain.parameters():
        factor.grad = torch.zeros_like(factor)
    domain.optimizer.step()
    domain.keep_as_best()
    kept = sum(map(_size, _tensors(domain.state_dict()))) * len(config.hydra.domain_names())
    merges = config.hydra.steps_per_phase > 0
    return kept + merges * sum(map(_size, _tensors(domain.best.factors)))


class SavedTensors:
    """Counts what autograd keeps for the backward pass: distinct storages, parameters excluded."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        self._known |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, _unchanged)
        self.num_bytes = 0

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._hooks.__exit__(*failure)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return tensor


class _Stepper:
    """Steps a model on random tokens, in the order of SigmaTrainer.train_step."""

    def __init__(
        self, config: SigmaConfig, *, model: Any, optimizer: Any, device: torch.device
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self._forward: Callable[..., Any] = build_forward(config, model)
        self._autocast = build_autocast(config, device)
        self._clip = config.optim.grad_clip
        self._accumulation = config.data.grad_accum_steps
        self._shape = (config.data.batch_size, config.data.seq_len + 1)
        self._generator = torch.Generator().manual_seed(config.run.seed)

    def forward_backward(self) -> float:
        """One micro-batch; its seconds."""
        vocab_size = self.model.config.vocab_size
        tokens = torch.randint(vocab_size, self._shape, generator=self._generator)  # (B, T + 1)
        tokens = tokens.to(self.device)
        reset_mask = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)  # (B, T)
        reset_mask[:, 0] = True
        start = _now(self.device)
        with self._autocast():
            output = self._forward(tokens[:, :-1], reset_mask=reset_mask, labels=tokens[:, 1:])
        loss = torch.stack([output.loss, *output.aux.values()]).float().sum()
        (loss / self._accumulation).backward()
        return _now(self.device) - start

    def update(self) -> float:
        """One optimizer step on the gradients there are; its seconds."""
        start = _now(self.device)
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self.model.after_optimizer_step()
        self.optimizer.zero_grad()
        return _now(self.device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def print_plan(plan: Plan) -> None:
    """The plan as a table on a terminal and as plain lines elsewhere."""
    rows = plan_rows(plan)
    if not sys.stdout.isatty():
        for name, value in rows:
            print(f"{name}: {value}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="SIGMA plan", title_justify="left", show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console().print(table)


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Every figure with its unit, in reading order."""
    memory = [
        ("weights", plan.weight_bytes),
        ("gradients", plan.gradient_bytes),
        ("optimizer state", plan.optimizer_bytes),
        ("weight average", plan.average_bytes),
        *([("reinforcement learning", plan.rl_bytes)] if plan.rl_bytes else []),
        *([("adapters per domain", plan.hydra_bytes)] if plan.hydra_bytes else []),
        ("activations of a micro-batch", plan.activation_bytes),
    ]
    total = sum(size for _, size in memory)
    enough = "enough" if plan.disk_free_bytes >= plan.checkpoints_bytes else "NOT ENOUGH"
    micro = ", ".join(f"{seconds * 1e3:.0f}" for seconds in plan.micro_step_s)
    update = statistics.median(plan.optimizer_step_s) * 1e3
    peak = [] if plan.peak_bytes is None else [("measured peak", plan.peak_bytes)]
    return [
        ("device", plan.device),
        ("parameters", f"{plan.parameters_total:,} ({plan.parameters_active:,} active)"),
        *(
            (f"memory, {name}", f"{size / MIB:,.1f} MiB")
            for name, size in [*memory, ("sum", total), *peak]
        ),
        ("micro-steps", f"{micro} ms"),
        ("optimizer step", f"{update:.0f} ms"),
        *([("RL tick", f"{plan.rl_tick_s * 1e3:.0f} ms")] if plan.rl_bytes else []),
        ("speed", f"{plan.tokens_per_s:,.0f} tokens/s at {plan.tokens_per_step:,} tokens a step"),
        (
            "time",
            f"{format_duration(plan.total_s)} for {plan.steps:,} steps "
            f"({plan.total_tokens:,} tokens), evaluation and saving not counted",
        ),
        (
            "disk",
            f"{plan.checkpoints_bytes / GIB:.2f} GiB for checkpoints of "
            f"{plan.checkpoint_bytes / MIB:,.1f} MiB; {plan.disk_free_bytes / GIB:.1f} GiB "
            f"free, {enough}",
        ),
    ]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    if not isinstance(tree, dict | list | tuple):
        return []
    return [tensor for child in children for tensor in _tensors(child)]


def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{device} ({name}, {torch.get_num_threads()} threads)"
