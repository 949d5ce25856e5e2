"""Train the plain GPT on exactly the batches SIGMA is trained on, and print its bits per byte.

    python scripts/baseline_gpt.py --steps 600                     equal tokens
    python scripts/baseline_gpt.py --minutes 8                     equal wall clock
    python scripts/baseline_gpt.py --steps 600 --lr-grid 1e-3,2e-3,4e-3
    python scripts/baseline_gpt.py --optimizer muon --lr 0.02 --adam-lr 3e-3 --steps 600

The learning rate warms up linearly and falls over the run's length, in steps or in minutes,
whichever ends first. Every `--eval-at` token count and the end give one JSON line; the clock stands
still while evaluating. `--lr-grid` repeats the run per learning rate and names the best.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from scripts.baseline_data import add_data_flags, load_corpus, report
from scripts.plain_gpt import PlainGPT, PlainGPTConfig
from training.data import TokenCorpus, TokenStream, validation_batches
from training.evaluation import evaluate_bpb
from training.runtime.environment import keep_freed_memory

EVAL_BATCH_TOKENS = 8192
BETAS = (0.9, 0.95)
# Quintic Newton-Schulz coefficients of Jordan et al. (2024): steepest at 0, bounded at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz in fp32 (Jordan et al. 2024).

    torch.optim.Muon orthogonalises in bf16, which an AVX2 CPU can only emulate. Fused projections
    are orthogonalised part by part: group option `parts`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter (rows, columns) with a gradient; one without keeps its
        momentum."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                direction = parameter.grad.lerp(state["momentum"], group["momentum"])
                update = torch.cat(
                    [orthogonalize(part) for part in direction.chunk(group["parts"])]
                )
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, *, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, scaled by sqrt(max(1, rows / columns))."""
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    scale = math.sqrt(max(1.0, rows / columns))
    return scale * (x.T if rows > columns else x)


def build_optimizers(model: PlainGPT, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon for the blocks' matrices and AdamW for the rest."""
    matrices = {n: p for n, p in model.blocks.named_parameters() if p.ndim == 2}
    vectors = [p for p in model.parameters() if p.ndim < 2]
    tables = [model.embed.weight]
    decay = options.weight_decay
    if options.optimizer == "adamw":
        groups = [
            {"params": [*matrices.values(), *tables], "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, lr=options.lr, betas=BETAS)]
    parts = {"qkv": 3, "gate_up": 2}
    by_parts: dict[int, list[nn.Parameter]] = {}
    for name, parameter in matrices.items():
        by_parts.setdefault(parts.get(name.split(".")[-2], 1), []).append(parameter)
    groups = [{"params": found, "parts": count} for count, found in by_parts.items()]
    return [
        Muon(groups, lr=options.lr, weight_decay=decay),
        torch.optim.AdamW([*tables, *vectors], lr=options.adam_lr, betas=BETAS, weight_decay=0.0),
    ]


def rate_factor(progress: float, *, schedule: str, final_ratio: float) -> float:
    """Learning rate over its peak at `progress` in [0, 1], warm-up apart."""
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        return final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    # Linear over the second half: the shape SIGMA uses by default.
    return 1.0 - (1.0 - final_ratio) * max(0.0, 2.0 * progress - 1.0)


class Run:
    """One training run and its stopwatch."""

    def __init__(
        self, corpus: TokenCorpus, *, options: argparse.Namespace, vocab_size: int
    ) -> None:
        self.corpus = corpus
        self.options = options
        config = PlainGPTConfig(
            vocab_size=vocab_size,
            d_model=options.d_model,
            layers=options.layers,
            heads=options.heads,
            d_ff=options.d_ff,
        )
        self.model = PlainGPT(config, seed=options.seed).to(options.device)
        self.optimizers = build_optimizers(self.model, options)
        self.peaks = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]
        self.stream = TokenStream(
            corpus, seed=options.seed, batch_size=options.batch_size, seq_len=options.seq_len
        )
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @property
    def num_tokens(self) -> int:
        return self.step * self.options.batch_size * self.options.seq_len

    @property
    def progress(self) -> float:
        """Share of the run that is done: in [0, 1], by steps or by time."""
        shares = [0.0]
        if self.options.steps:
            shares.append(self.step / self.options.steps)
        if self.options.minutes:
            shares.append(self.seconds / (60.0 * self.options.minutes))
        return max(shares)

    def results(self) -> Iterator[dict[str, Any]]:
        """Train to the end; a row at every wished token count and at the end."""
        wished = sorted(self.options.eval_at, reverse=True)
        while self.progress < 1.0:
            self._train_step()
            if wished and self.num_tokens >= wished[-1] and self.progress < 1.0:
                while wished and self.num_tokens >= wished[-1]:
                    wished.pop()
                yield self._evaluate(finished=False)
        yield self._evaluate(finished=True)

    def _train_step(self) -> None:
        start = time.perf_counter()
        options = self.options
        factor = rate_factor(
            self.progress, schedule=options.schedule, final_ratio=options.lr_final_ratio
        )
        factor *= min(1.0, (self.step + 1) / max(1, options.warmup_steps))
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        batch = self.stream.next_batch()
        loss = self.model(
            batch.input_ids.to(options.device),
            reset_mask=batch.reset_mask.to(options.device),
            labels=batch.labels.to(options.device),
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        self.step += 1
        self.seconds += time.perf_counter() - start

    def _evaluate(self, *, finished: bool) -> dict[str, Any]:
        options = self.options
        batches = validation_batches(
            self.corpus,
            seq_len=options.seq_len,
            batch_size=max(1, EVAL_BATCH_TOKENS // options.seq_len),
            max_tokens=options.eval_tokens or None,
        )
        result = evaluate_bpb(self.model, batches, device=options.device)
        recent = self.losses[-20:]
        return {
            "baseline": "plain GPT",
            "finished": finished,
            "bpb": result.bpb,
            "loss": result.loss,
            "train_loss": sum(recent) / max(1, len(recent)),
            "step": self.step,
            "train_tokens": self.num_tokens,
            "train_s": round(self.seconds, 2),
            "tokens_per_s": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            "parameters": self.model.num_parameters(),
            "eval_tokens": result.num_tokens,
            "eval_bytes": result.num_bytes,
            "d_ff": self.model.config.d_ff,
            **{name: getattr(options, name) for name in REPORTED},
        }


REPORTED = (
    "optimizer lr adam_lr weight_decay schedule warmup_steps d_model layers heads seq_len "
    "batch_size seed tokenizer_name"
).split()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train the plain GPT on SIGMA's batches.", allow_abbrev=False
    )
    add_data_flags(parser)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d-ff", type=int, default=0, help="0 = 8/3 of --d-model")
    parser.add_argument("--steps", type=int, default=0, help="end after so many steps")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so much training")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak; of Muon where it is used")
    parser.add_argument("--lr-grid", type=_numbers, default=[], metavar="X,X,...")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="of what Muon leaves to AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--schedule", choices=("cosine", "linear"), default="linear")
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--lr-final-ratio", type=float, default=0.05)
    parser.add_argument("--grad-clip", type=float, default=1.0)
    parser.add_argument("--eval-at", type=_numbers, default=[], metavar="N,N,...")
    parser.add_argument("--device", default="cpu")
    return parser


def _numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    if not options.steps and not options.minutes:
        print("error: give the length of the run: --steps or --minutes", file=sys.stderr)
        return 2
    keep_freed_memory()  # as training does: a fair race has one allocator
    try:
        tokenizer, corpus = load_corpus(options.tokenizer_name)
        ends: list[dict[str, Any]] = []
        for lr in options.lr_grid or [options.lr]:
            options.lr = lr
            row: dict[str, Any] = {}
            for row in Run(corpus, options=options, vocab_size=tokenizer.vocab_size).results():
                report(row, output=options.output)
            ends.append(row)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(ends) > 1:
        best = min(ends, key=lambda row: row["bpb"])
        print(f"best learning rate {best['lr']:g}: {best['bpb']:.4f} bits per byte")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
