"""What INSTANT saves and costs, against autograd alone and checkpointing of every block.

All ways train the same network on the same tokens in one process. Bytes are the allocator's: what
is alive after the forward beyond what was before (what backward needs), and the peak of forward and
backward. Times are interleaved, one micro-batch of each way per round; processor time on a CPU, so
that a busy machine changes little.

    python scripts/bench_instant.py [--seq-len 512 2048] [--layers 18] [--rounds 5] [--out FILE]
    python scripts/bench_instant.py --seq-len 512 --ways off,checkpoint --budgets-mb 60,70,80

The second form gives compressed blocks a byte budget, shared out by measured sensitivity, and shows
which mean number of bits keeps how much of the gradient.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from training.instant import InstantSettings, apply_instant, instant_memory

WAYS = ("off", "checkpoint", "reversible", "auto", "compress")


@dataclass(slots=True, kw_only=True)
class Row:
    """One way at one length. Bytes beyond what was allocated before; seconds per micro-batch.

    reported_bytes: what INSTANT says it keeps. cosine: of the gradient with that of "off". bits:
    per number of the compressed tensors, scales included; 0 where none is.
    """

    way: str
    seq_len: int
    saved_bytes: int
    peak_bytes: int
    reported_bytes: int
    seconds: float
    cosine: float
    bits: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--mamba-ratio", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ways", default=",".join(WAYS), help="by commas; off and checkpoint too")
    parser.add_argument("--budgets-mb", default="", help="MiB of compressed blocks, by commas")
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if not {"off", "checkpoint"} <= set(ways) <= set(WAYS):
        parser.error(f"--ways: off and checkpoint, and any of {', '.join(WAYS)}")
    ways += [f"compress {size}" for size in options.budgets_mb.split(",") if size]
    torch.set_num_threads(1)
    rows = []
    for length in options.seq_len:
        config = bench_config(
            d_model=options.d_model, layers=options.layers, mamba_ratio=options.mamba_ratio
        )
        model = SigmaLLM(config).to(options.device).train()
        ids = random_tokens(model, options.batch_size, length)
        rows += compare(model, ids, ways=ways, rounds=options.rounds)
    print_table(rows)
    if options.out is not None:
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()} {platform.system()}, one thread",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["scripts/bench_instant.py", *sys.argv[1:]]),
        }
        text = json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


def bench_config(
    *, d_model: int, layers: int, mamba_ratio: int = 5, **changes: Any
) -> SigmaModelConfig:
    """The default network's proportions at a smaller width; changes: fields to set otherwise."""
    values: dict[str, Any] = dict(
        vocab_size=4096,
        d_model=d_model,
        n_layers=layers,
        n_heads=max(1, d_model // 64),
        mamba_ratio=mamba_ratio,
        kv_latent_dim=max(16, d_model // 6),
        mamba_d_state=min(128, d_model // 2),
        mamba_head_dim=min(64, d_model),
        d_ff=d_model * 4 // 3 * 3,
    )
    return SigmaModelConfig(**(values | changes)).validate()


def random_tokens(model: SigmaLLM, batch_size: int, length: int) -> Tensor:
    """Ids (batch_size, length) on the model's device; the length alone is the seed."""
    generator = torch.Generator().manual_seed(length)
    size = model.config.vocab_size
    ids = torch.randint(size, (batch_size, length), generator=generator)
    return ids.to(model.embed.weight.device)


def choose(model: SigmaLLM, way: str) -> None:
    """Set the model up for one of WAYS, or for "compress N" with a budget of N MiB."""
    model.gradient_checkpointing = way == "checkpoint"
    mode, _, budget = ("off" if way == "checkpoint" else way).partition(" ")
    apply_instant(model, InstantSettings(mode=mode, byte_budget_mb=int(budget or 0)))


def micro_batch(model: SigmaLLM, ids: Tensor) -> Tensor:
    """The loss (0-d) with all auxiliary ones, for `backward`; labels are ids (B, T) shifted by
    one."""
    out = model(ids, labels=ids.roll(-1, 1))
    return torch.stack([out.loss, *out.aux.values()]).sum()


def compare(model: SigmaLLM, ids: Tensor, *, ways: Sequence[str], rounds: int) -> list[Row]:
    """Rows of all ways; medians of the rounds."""
    figures = {way: measure_bytes(model, ids, way) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    gradients, bits = {}, {}
    for _ in range(rounds):
        for way in ways:
            choose(model, way)
            with model.weights_held():
                micro_batch(model, ids).backward()  # warm: slots are probed, codes known
                model.zero_grad()
                start = clock(ids)
                micro_batch(model, ids).backward()
                times[way].append(clock(ids) - start)
            bits[way] = instant_memory(model).finish_step().bits
            gradients[way] = flat_gradient(model)
            model.zero_grad()
    return [
        Row(
            way=way,
            seq_len=ids.shape[1],
            saved_bytes=figures[way][0],
            peak_bytes=figures[way][1],
            reported_bytes=figures[way][2],
            seconds=statistics.median(times[way]),
            cosine=float(
                torch.nn.functional.cosine_similarity(gradients[way], gradients["off"], dim=0)
            ),
            bits=bits[way],
        )
        for way in ways
    ]


def flat_gradient(model: SigmaLLM) -> Tensor:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]).double()


def clock(like: Tensor) -> float:
    """Seconds: of the wall after waiting for a CUDA device, else of this process's processor
    time."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
        return time.perf_counter()
    return time.process_time()


def measure_bytes(model: SigmaLLM, ids: Tensor, way: str) -> tuple[int, int, int]:
    """Bytes alive after the forward, peak of forward and backward, and what INSTANT reports.

    Gradients and ternary codes exist beforehand, so that only activations are in the figures.
    """
    choose(model, way)
    with model.weights_held():
        micro_batch(model, ids).backward()
        instant_memory(model).finish_step()
        kept: list[Tensor] = []
        saved, _ = allocated(lambda: kept.append(micro_batch(model, ids)), device=ids.device)
        kept.pop().backward()
        reported = instant_memory(model).finish_step().stored_bytes
        _, peak = allocated(lambda: micro_batch(model, ids).backward(), device=ids.device)
    model.zero_grad()
    return saved, peak, reported


def allocated(run: Callable[[], object], *, device: torch.device) -> tuple[int, int]:
    """Bytes that run() leaves allocated, and the most it had at once, by the allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device)
        return after - before, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    results = recorded.profiler.kineto_results if recorded.profiler is not None else None
    for event in results.events() if results is not None else ():
        if event.name() == "[memory]":
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, now)
    return now, peak


def print_table(rows: list[Row]) -> None:
    base = {row.seq_len: row for row in rows if row.way == "checkpoint"}
    print(
        "length  way          saved MiB  of ckpt  peak MiB  of ckpt  seconds  of ckpt  1 - cosine"
        "  bits"
    )
    for row in rows:
        other = base[row.seq_len]
        print(
            f"{row.seq_len:6d}  {row.way:11s}"
            f"{row.saved_bytes / 2**20:11.2f}{row.saved_bytes / other.saved_bytes:9.2f}"
            f"{row.peak_bytes / 2**20:10.2f}{row.peak_bytes / other.peak_bytes:9.2f}"
            f"{row.seconds:9.3f}{row.seconds / other.seconds:9.2f}{1 - row.cosine:12.1e}"
            f"{row.bits:6.2f}"
        )


if __name__ == "__main__":
    main()
