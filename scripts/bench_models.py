"""The networks that benches train: every part of SigmaLLM in three sizes, ours and plainly written.

That is profiles/quickstart.txt with other widths and with what it leaves out: differential
attention and experts. Router noise is off in both (the plain twin has none).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from scripts.baseline_gpt import orthogonalize
from scripts.plain_sigma import PlainSigma
from training.build import build_trainer
from training.config.cli import parse_args
from training.config.sigma_config import SigmaConfig
from training.instant import apply_instant
from training.optimizer import projection_names
from training.sigma_trainer import SigmaTrainer
from training.stream.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
# Names say the active parameters. Widths of 1M and 10M keep the quickstart's proportions.
SIZES: dict[str, tuple[str, ...]] = {
    "1M": (
        "--d-model=96", "--n-heads=3", "--kv-latent-dim=24", "--d-ff=288", "--engram-buckets=4096",
    ),
    "3M": (),
    "10M": (
        "--d-model=384", "--n-heads=12", "--kv-latent-dim=96", "--d-ff=1152",
    ),
}  # fmt: skip


def quickstart_config(device: torch.device, *flags: str) -> SigmaConfig:
    """The quickstart with all parts of the network and `flags` on top.

    Its folder is a name only: nothing is written before `fit`.
    """
    folder = Path(tempfile.gettempdir()) / f"sigma_bench_{os.getpid()}"
    return parse_args(
        [
            f"@{ROOT / 'profiles' / 'quickstart.txt'}",
            f"--device={device.type}",
            f"--output-dir={folder}",
            f"--checkpoint-dir={folder}/checkpoints",
            "--diff-attention-enabled",
            "--n-routed-experts=4",
            "--router-balance-lr=0.01",
            "--router-jitter-noise=0",
            "--integrity-hidden-eval-every=0",
            "--no-integrity-guards-enabled",
            "--no-strict-runtime-audit",
            "--no-strict-feature-usage",
            *flags,
        ]
    )


def sigma_trainer(config: SigmaConfig) -> SigmaTrainer:
    """Our trainer as the program builds it; nothing is written before `fit`."""
    return build_trainer(config)


def token_model(device: torch.device, *flags: str, **changes: object) -> SigmaLLM:
    """A SigmaLLM of the quickstart's design without its trainer."""
    config = quickstart_config(device, *flags).model_config(4096)
    model = SigmaLLM(replace(config, **changes), seed=0).to(device)  # type: ignore[arg-type]
    apply_instant(model)
    return model


def random_batch(
    rows: int, length: int, *, vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """ids and labels (rows, length) int64 from a fixed generator."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (rows, length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class PlainMuon(torch.optim.Optimizer):
    """Momentum, Newton-Schulz matrix by matrix, in fp32; torch's own Muon takes no stacks."""

    def __init__(self, params: list[nn.Parameter], *, lr: float, num_steps: int) -> None:
        super().__init__(params, {"lr": lr, "num_steps": num_steps, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter (..., rows, columns), matrix by matrix; all must have
        gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                for target, matrix in zip(
                    parameter.view(-1, *parameter.shape[-2:]),
                    direction.view(-1, *parameter.shape[-2:]),
                    strict=True,
                ):
                    update = orthogonalize(matrix, steps=group["num_steps"])
                    target.add_(update, alpha=-group["lr"])


class PlainTrainer:
    """The plain twin's training loop: forward, backward, clip, step, balance the routers."""

    def __init__(self, config: SigmaConfig, model: SigmaLLM, *, compiled: bool) -> None:
        settings: SigmaModelConfig = model.config
        self.model = PlainSigma(settings, model.state_dict()).to(model.embed.weight.device)
        self.forward = torch.compile(self.model) if compiled else self.model
        projections = projection_names(model)
        named = dict(self.model.named_parameters())
        matrices = [named[name] for name in named if name in projections]
        rest = [named[name] for name in named if name not in projections]
        self.clip = config.optim.grad_clip
        self.optimizers = [
            PlainMuon(matrices, lr=config.optim.lr, num_steps=config.optim.gn_ns_steps),
            torch.optim.AdamW(rest, lr=config.optim.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def loss(self, batch: Batch) -> Tensor:
        """Mean nats plus auxiliary loss of a batch."""
        output = self.forward(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
        return output.loss + output.aux

    def train_step(self, batch: Batch) -> float:
        """One step; the loss before it."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.balance()
        return loss.item()
