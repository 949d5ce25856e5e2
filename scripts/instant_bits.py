"""How many bits a saved number needs: cosine of the gradient under compressed activations.

A small network of two streams is trained on text for --steps steps, then one batch's gradient is
taken exactly and with all blocks compressed: every tensor at 4, 5, 6 or 8 bits, and under byte
budgets that measured sensitivity shares out. Shown are the cosine of the whole gradient, the median
over parameter tensors and the share of them at 0.99, means of --roundings; and mean bits, scales
and lossless codes included.

    python scripts/instant_bits.py [--budgets-mb 13,14] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.sigma_llm import SigmaLLM
from scripts.ablation import Arm, Lane
from scripts.bench_common import cpu_name, load_average
from training.activation.slots import WIDTHS
from training.instant import InstantSettings, apply_instant, instant_memory
from training.runtime.environment import versions

FLAGS = """
--no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k
--d-model 64 --n-heads 2 --n-layers 4 --mamba-ratio 3 --attention-ratio 1
--residual-layout two-stream --kv-latent-dim 24 --rope-dim 8 --mamba-head-dim 32
--mamba-d-state 16 --mamba-chunk-len 32 --mimo-rank 2 --d-ff 144 --n-routed-experts 4
--seq-len 128 --batch-size 4 --warmup-steps 10 --warmdown-fraction 0.6 --optimizer muon
--lr 0.02 --adam-lr 0.02 --gn-ns-steps 3 --eval-interval 0 --sample-interval 0 --instant-mode off
"""
GOOD = 0.99


class Rows(NamedTuple):
    """What a forward reads of a batch, each (B, T)."""

    input_ids: Tensor
    labels: Tensor
    reset_mask: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--roundings", type=int, default=3)
    parser.add_argument("--budgets-mb", default="13,14", help="MiB of saved tensors, by commas")
    parser.add_argument("--codings", default=",".join(WIDTHS), help="for all tensors, by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model, batch = trained(options.steps, directory=Path(directory))
    apply_instant(model)
    exact = gradients(model, batch)
    rows = []
    ways: dict[str, Callable[[], None]] = {}
    for coding in filter(None, options.codings.split(",")):
        ways[f"all {coding}"] = partial(fix, model, batch, coding)
    for size in filter(None, options.budgets_mb.split(",")):
        settings = InstantSettings(mode="compress", byte_budget_mb=int(size))
        ways[f"budget of {size} MiB"] = partial(share, model, batch, settings)
    for way, patch in ways.items():
        found = measure(model, batch, exact, patch, roundings=options.roundings)
        rows.append({"way": way} | found)
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"cpu": cpu_name(), "load": load_average()},
            "versions": versions(),
            "command": " ".join(["scripts/instant_bits.py", *sys.argv[1:]]),
            "flags": FLAGS.split(),
        }
        text = json.dumps(about | {"rows": rows}, indent=1) + "\n"
        options.out.write_text(text, encoding="utf-8", newline="\n")


def trained(steps: int, *, directory: Path) -> tuple[SigmaLLM, Rows]:
    """The network after `steps`, in training, and four batches it has not seen, as one."""
    lane = Lane(FLAGS.split(), Arm(name="run"), seed=1, steps=steps, directory=directory)
    lane.advance(steps, clock=time.process_time)
    model = lane.trainer.model
    assert isinstance(model, SigmaLLM)
    batches = [lane.trainer.stream.next_batch() for _ in range(4)]
    lane.close()
    joined = Rows(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.reset_mask for batch in batches]),
    )
    return model.train(), joined


def gradients(model: SigmaLLM, batch: Rows) -> dict[str, Tensor]:
    """By parameter name; the router's noise is the same every time."""
    model.zero_grad()
    torch.manual_seed(7)
    with model.weights_held():
        out = model(batch.input_ids, labels=batch.labels, reset_mask=batch.reset_mask)
        torch.stack([out.loss, *out.aux.values()]).sum().backward()
    return {
        name: param.grad.flatten().double()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def fix(model: SigmaLLM, batch: Rows, coding: str) -> None:
    """Compress every block with one coding for all tensors."""
    apply_instant(model, InstantSettings(mode="compress", error_threshold=0.0))
    gradients(model, batch)
    book = instant_memory(model).book
    book.rules.budgeted = True
    book.assign({name: coding for name in book.slots})


def share(model: SigmaLLM, batch: Rows, settings: InstantSettings) -> None:
    """Compress every block under a byte budget; the first forward measures and decides."""
    apply_instant(model, settings)
    gradients(model, batch)


def measure(
    model: SigmaLLM,
    batch: Rows,
    exact: dict[str, Tensor],
    patch: Callable[[], None],
    *,
    roundings: int,
) -> dict[str, Any]:
    """Cosines with the exact gradients and mean bits of the numbers that are coded."""
    patch()
    memory = instant_memory(model)
    memory.finish_step()
    whole, single, bits = [], [], 0.0
    for rounding in range(roundings):
        memory.begin_step(rounding + 1, seed=rounding)
        found = gradients(model, batch)
        bits = memory.finish_step().bits
        whole.append(cosine(torch.cat(list(found.values())), torch.cat(list(exact.values()))))
        single.append({name: cosine(found[name], exact[name]) for name in exact})
    by_tensor = [statistics.fmean(row[name] for row in single) for name in exact]
    return {
        "bits": round(bits, 2),
        "cosine": round(statistics.fmean(whole), 4),
        "lowest_rounding": round(min(whole), 4),
        "tensor_median": round(statistics.median(by_tensor), 4),
        "tensors_at_0.99": round(statistics.fmean(value >= GOOD for value in by_tensor), 2),
    }


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


if __name__ == "__main__":
    main()
