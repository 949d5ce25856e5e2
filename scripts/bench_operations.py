"""Decoding, the loss and the optimizer's step, each against what torch offers.

    python scripts/bench_operations.py --json bench/results/operations_cpu.json

Decoding: one row, greedy, by the token step (model/decode.py), against the same network in full
precision; once from ternary codes that are there, as a packed model has them, once by its blocks as
in training, once with all weights rounded before the first token. Cross entropy: forward and
backward of head and loss. Optimizers: the quickstart's own matrices and tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cross_entropy import linear_cross_entropy
from model.generation import generate
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache
from scripts.bench_common import BenchOptions, Case, Run, run_bench
from scripts.bench_models import SIZES, PlainMuon, quickstart_config, token_model
from training.optimizer import OptimizerSet, build_optimizer, projection_names

DECODED = 32
LOSS_SHAPES = ((2048, 192, 4096), (512, 256, 32768))  # tokens, width, vocabulary
BYTES_PER_ADAM_PARAMETER = 28  # read weight, gradient, two moments; write three of them


def cases(options: BenchOptions) -> list[Case]:
    return [
        *(decoding_case(options, size) for size in ("3M", "10M")),
        *(loss_case(options, *shape) for shape in LOSS_SHAPES),
        muon_case(options),
        adam_case(options),
    ]


def decoding_case(options: BenchOptions, size: str) -> Case:
    def decode(*, held: bool = True, by_blocks: bool = False, **changes: object) -> Run:
        model = token_model(options.device, *SIZES[size], **changes).eval()
        prompt = torch.zeros(1, 8, dtype=torch.int64, device=options.device)
        cache = TernaryCache()
        no_step = mock.patch("model.sigma_llm.token_step", lambda *args: None)

        def run() -> None:
            with (
                torch.inference_mode(),
                cache.held() if held else nullcontext(),
                no_step if by_blocks else nullcontext(),
            ):
                generate(model, prompt, max_new_tokens=DECODED, temperature=0.0)

        return run

    return Case(
        bench="decoding",
        name=f"{size}, one row",
        unit="tokens/s",
        amount=DECODED,
        ways={
            "SIGMA, ternary codes": decode,
            "the same in fp32": lambda: decode(quant_mode="none"),
            "by its blocks": lambda: decode(by_blocks=True),
            "ternary codes made first": lambda: decode(held=False),
        },
    )


def loss_case(options: BenchOptions, tokens: int, width: int, vocab: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(options.device)
    weight = (torch.randn(vocab, width, generator=generator) * 0.02).to(options.device)
    labels = torch.randint(0, vocab, (tokens,), generator=generator).to(options.device)

    def timed(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            function(*leaves, labels).backward()

        return run

    def plainly(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels)

    return Case(
        bench="linear + cross entropy",
        name=f"{tokens} tokens, width {width}, {vocab} words",
        unit="tokens/s",
        amount=tokens,
        ways={
            "SIGMA": lambda: timed(linear_cross_entropy),
            "F.linear and F.cross_entropy": lambda: timed(plainly),
            "the same, torch.compile": lambda: timed(torch.compile(plainly)),
        },
        count_products=True,
    )


def muon_case(options: BenchOptions) -> Case:
    """The quickstart's projections; torch.optim.Muon takes matrices only, so stacks are cut."""
    config = quickstart_config(options.device)
    settings = {"lr": config.optim.lr, "num_steps": config.optim.gn_ns_steps}
    size = sum(p.numel() for p in projections(token_model(options.device)))

    def ours() -> Run:
        model = with_gradients(token_model(options.device))
        return part_of(build_optimizer(model, config.optim), "Muon").step

    def plain() -> Run:
        return PlainMuon(projections(with_gradients(token_model(options.device))), **settings).step

    def torch_muon() -> Run:
        matrices = []
        for parameter in projections(with_gradients(token_model(options.device))):
            for matrix in parameter.detach().view(-1, *parameter.shape[-2:]).unbind():
                leaf = nn.Parameter(matrix.clone())
                leaf.grad = torch.ones_like(leaf)
                matrices.append(leaf)
        return torch.optim.Muon(matrices, lr=settings["lr"], ns_steps=settings["num_steps"]).step

    return Case(
        bench="optimizer step",
        name="Muon, 3 Newton-Schulz steps",
        unit="parameters/s",
        amount=size,
        ways={"SIGMA": ours, "plain, matrix by matrix": plain, "torch.optim.Muon": torch_muon},
        count_products=True,
    )


def adam_case(options: BenchOptions) -> Case:
    """What the quickstart leaves to AdamW: tables, embedding, norms, gates."""
    config = quickstart_config(options.device)

    def rest() -> list[nn.Parameter]:
        model = with_gradients(token_model(options.device))
        taken = {id(parameter) for parameter in projections(model)}
        return [p for p in model.parameters() if id(p) not in taken]

    def ours() -> Run:
        model = with_gradients(token_model(options.device))
        return part_of(build_optimizer(model, config.optim), "AdamW").step

    amount = sum(p.numel() for p in rest())
    return Case(
        bench="optimizer step",
        name="AdamW",
        unit="parameters/s",
        amount=amount,
        ways={
            "SIGMA": ours,
            "torch.optim.AdamW": lambda: torch.optim.AdamW(rest()).step,
            "torch.optim.AdamW, fused": lambda: torch.optim.AdamW(rest(), fused=True).step,
        },
        bytes_moved=BYTES_PER_ADAM_PARAMETER * amount,
    )


def part_of(optimizers: OptimizerSet, kind: str) -> torch.optim.Optimizer:
    return next(part for part in optimizers.parts if kind.lower() in type(part).__name__.lower())


def projections(model: SigmaLLM) -> list[nn.Parameter]:
    """The parameters that Muon takes: matrices, and stacks of them for experts."""
    names = projection_names(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def with_gradients(model: SigmaLLM) -> SigmaLLM:
    """The model with a gradient on every parameter, from a fixed generator."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device)
    return model


if __name__ == "__main__":
    sys.exit(run_bench(__doc__ or "", cases))
