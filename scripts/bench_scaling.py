"""How the cost of a token grows with the row's length and with the number of experts.

    python scripts/bench_scaling.py --json bench/results/scaling_cpu.json

Forward and backward at a constant number of tokens. A scan costs the same per token at any length,
attention grows with it; experts cost nothing but smaller products when the active width is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.sigma_llm import SigmaLLM
from scripts.bench_common import BenchOptions, Case, Run, run_bench
from scripts.bench_models import random_batch, token_model

TOKENS = 4096
LENGTHS = (128, 512, 2048, 4096)
EXPERTS = (0, 4, 8, 16)
SMALL = (
    "--d-model=96", "--n-heads=3", "--kv-latent-dim=24", "--d-ff=288", "--no-engram-enabled",
    "--n-layers=3",
)  # fmt: skip
SCAN_ONLY = ("--mamba-ratio=1", "--attention-ratio=0")
ATTENTION_ONLY = ("--mamba-ratio=0", "--attention-ratio=1")


def cases(options: BenchOptions) -> list[Case]:
    """Lengths for a network of scans and one of attention, then experts."""
    networks = {
        "scan": token_model(options.device, *SMALL, *SCAN_ONLY),
        "attention": token_model(options.device, *SMALL, *ATTENTION_ONLY),
    }
    found = [
        Case(
            bench="tokens/s by length",
            name=kind,
            unit="tokens/s",
            amount=TOKENS,
            ways={
                f"T = {length}": lambda model=model, length=length: passes(model, length, options)
                for length in LENGTHS
            },
        )
        for kind, model in networks.items()
    ]
    found.append(
        Case(
            bench="tokens/s by experts",
            name="2 of E, equal active width",
            unit="tokens/s",
            amount=TOKENS,
            ways={
                f"E = {count}" if count else "dense": lambda count=count: passes(
                    token_model(options.device, *SMALL, f"--n-routed-experts={count}"), 512, options
                )
                for count in EXPERTS
            },
        )
    )
    return found


def passes(model: SigmaLLM, length: int, options: BenchOptions) -> Run:
    """Forward and backward of TOKENS tokens in rows of `length`."""
    ids, labels = random_batch(
        TOKENS // length, length, vocab_size=model.config.vocab_size, device=options.device
    )
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        output = model(ids, labels=labels)
        (output.loss + sum(output.aux.values())).backward()

    return run


if __name__ == "__main__":
    sys.exit(run_bench(__doc__ or "", cases))
