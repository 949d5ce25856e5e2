"""A whole training step of SIGMA against the same network written plainly in PyTorch.

    python scripts/bench_training.py --json bench/results/training_cpu.json

Ours is what `fit` does per step: data, forward, backward, finiteness checks, clipping, Muon and
AdamW. The peer is scripts/plain_sigma.py with the same weights, batches and optimizers in a plain
loop, eager and under torch.compile. Their first losses must agree, or the row fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.bench_common import BenchOptions, Case, Run, run_bench
from scripts.bench_models import SIZES, PlainTrainer, quickstart_config, sigma_trainer
from training.config.sigma_config import SigmaConfig
from training.micro_batch import move_batch

SAME_LOSS = 5e-3  # nats; one activation that falls into the next int8 step moves the rest
LARGE = (  # the default profile's widths and batch, for a GPU
    "--d-model=768", "--n-heads=12", "--n-layers=18", "--kv-latent-dim=128", "--rope-dim=32",
    "--mamba-head-dim=64", "--mamba-d-state=128", "--mamba-chunk-len=128", "--d-ff=3072",
    "--n-routed-experts=8", "--batch-size=4", "--seq-len=512", "--no-engram-enabled",
)  # fmt: skip


def cases(options: BenchOptions) -> list[Case]:
    compiled = ("3M",)  # compiling takes a minute or more per network
    found = [
        training_case(name, flags, options, compiled=name in compiled)
        for name, flags in SIZES.items()
    ]
    large = training_case("default widths, rank 1", LARGE, options, compiled=True)
    large.on = "cuda"
    return [*found, large]


def training_case(
    name: str, flags: tuple[str, ...], options: BenchOptions, *, compiled: bool
) -> Case:
    """Ours and the plain twin, each also compiled if asked."""
    config = quickstart_config(options.device, *flags)
    facts: dict[str, object] = {}
    losses: list[float] = []
    ways: dict[str, Callable[[], Run]] = {
        "SIGMA": lambda: ours(config, facts, losses),
        "plain PyTorch": lambda: plain(config, options, facts, losses, compiled=False),
    }
    if compiled:
        ways["SIGMA, torch.compile"] = lambda: ours(
            quickstart_config(options.device, *flags, "--torch-compile"), {}, []
        )
        ways["plain PyTorch, torch.compile"] = lambda: plain(
            config, options, {}, losses, compiled=True
        )
    return Case(
        bench="training step",
        name=name,
        unit="tokens/s",
        amount=config.data.batch_size * config.data.seq_len,
        ways=ways,
        count_products=True,
        facts=facts,
    )


def ours(config: SigmaConfig, facts: dict[str, object], losses: list[float]) -> Run:
    """The trainer's step; notes the network's size and its first loss."""
    trainer = sigma_trainer(config)
    counts = trainer.model.num_parameters()  # type: ignore[operator]
    facts |= {
        "active_parameters": counts["active"],
        "parameters": counts["total"],
        "batch": config.data.batch_size,
        "seq_len": config.data.seq_len,
    }
    first = trainer.attempt_step()
    if first is not None and first.train_loss is not None:
        losses.append(float(first.train_loss))
    return trainer.attempt_step


def plain(
    config: SigmaConfig,
    options: BenchOptions,
    facts: dict[str, object],
    losses: list[float],
    *,
    compiled: bool,
) -> Run:
    """The twin's step; RuntimeError if its first loss is not ours."""
    trainer = sigma_trainer(config)
    stream = trainer.stream
    twin = PlainTrainer(config, trainer.model, compiled=compiled)  # type: ignore[arg-type]

    def step() -> float:
        return twin.train_step(move_batch(stream.next_batch(), options.device))

    batch = move_batch(stream.next_batch(), options.device)
    with torch.no_grad():
        first = float(
            twin.model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels).loss
        )
    if losses:
        facts["first_loss_difference"] = abs(first - losses[0])
        if abs(first - losses[0]) > SAME_LOSS:
            raise RuntimeError(f"the plain twin's first loss is {first}, ours {losses[0]}")
    return step


if __name__ == "__main__":
    sys.exit(run_bench(__doc__ or "", cases))
