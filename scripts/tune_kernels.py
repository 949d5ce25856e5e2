"""Measure launch settings of the Triton kernels for a model's shapes on this GPU, and keep them.

    python scripts/tune_kernels.py --tokens 2048 --d-model 768 --d-expert 1024 --vocab-size 32768

Every product that a training step of such a model launches is run with the heuristic's tiles and
with others; the fastest goes into `launch_table.json` beside the kernel cache, where training
looks for it. Training itself never measures. A setting that the GPU has no room for is left out.
Needs CUDA: times of the interpreter say nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton

from model import fused_cross_entropy, ternary_experts, ternary_linear
from model.dispatch import DispatchPlan
from model.launch import Tiles, device_capability, power_of_two, processor_count
from model.launch_table import FOLDER_VARIABLE, LaunchKey, LaunchTable, table_path
from training.runtime.environment import prepare_caches

ROUNDS = 20
MARGIN = 0.97  # others must beat the heuristic by more than rounds differ


@dataclass(slots=True, kw_only=True)
class Trial:
    """One product of a training step: its key in the table, the heuristic, and how to run it.

    fixed_rows: whether the rows of a tile are settled before the product.
    """

    key: LaunchKey
    default: Tiles
    run: Callable[[Tiles], object]
    fixed_rows: bool = False


def candidates(default: Tiles) -> list[Tiles]:
    """The heuristic first, then its neighbours: another row or column block, depth, or stages."""
    found = [default]
    for m, n, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)):
        for k in sorted({default.k // 2, default.k}):
            for stages in (3, 4):
                tiles = Tiles(m, n, max(k, 16), warps, stages)
                if tiles not in found:
                    found.append(tiles)
    return found


def trials(options: argparse.Namespace, device: torch.device) -> Iterator[Trial]:
    """Every operation and shape that a training step of such a model launches; inputs are made on
    the way."""
    tokens, width = options.tokens, options.d_model
    for columns, depth in (
        *((width, width), (width, options.d_expert)),
        *((2 * options.d_expert, width), (width, 2 * options.d_expert)),
    ):
        yield from _linear_trials(tokens, columns, depth, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if options.experts:
        for columns, depth in ((2 * options.d_expert, width), (width, options.d_expert)):
            yield _grouped_trial(options, columns, depth, device, dtype)
    yield from _loss_trials(tokens, width, options.vocab_size, device, dtype)


def _key(operation: str, x: torch.Tensor, shape: tuple[int, int, int], itemsize: int) -> LaunchKey:
    return LaunchKey(
        operation=operation,
        itemsize=itemsize,
        capability=device_capability(x),
        rows=power_of_two(shape[0]),
        columns=shape[1],
        depth=shape[2],
    )


def _linear_trials(tokens: int, columns: int, depth: int, device: torch.device) -> Iterator[Trial]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(tokens, depth, generator=generator).to(device)
    weight = torch.randn(columns, depth, generator=generator).to(device)
    in_bf16 = device.type == "cuda"
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    grad = torch.randn(tokens, columns, generator=generator).to(device, dtype)
    codes, scale = ternary_linear.quantize_rows(values)
    ternary = ternary_linear.ternarize_rows(weight)
    shape = (tokens, columns, depth)
    yield Trial(
        key=_key("int8_product", codes, shape, 1),
        default=ternary_linear.product_tiles(tokens, device_capability(codes)),
        run=lambda tiles: ternary_linear.int8_product(
            *(codes, ternary.codes),
            **{"a_scale": scale, "b_scale": ternary.scale, "dtype": dtype, "tiles": tiles},
        ),
    )
    yield Trial(
        key=_key("weight_gradient", codes, shape, 2 if in_bf16 else 4),
        default=ternary_linear.gradient_tiles(device_capability(codes)),
        run=lambda tiles: ternary_linear.weight_gradient(
            grad, codes, scale, in_bf16=in_bf16, tiles=tiles
        ),
    )


def _grouped_trial(
    options: argparse.Namespace, columns: int, depth: int, device: torch.device, dtype: torch.dtype
) -> Trial:
    """The experts' product; every expert gets its share of the tokens, up to chance."""
    generator = torch.Generator().manual_seed(0)
    num_rows, experts = options.tokens * options.top_k, options.experts
    values = torch.randn(options.tokens, depth, generator=generator).to(device)
    weight = torch.randn(experts, columns, depth, generator=generator).to(device)
    chosen = torch.rand(options.tokens, experts, generator=generator).topk(options.top_k).indices
    plan = DispatchPlan.create(chosen.to(device), experts, grouped=True)
    groups = ternary_experts.RowGroups.create(plan)
    codes, scale = ternary_linear.quantize_rows(values)
    ternary = ternary_linear.ternarize_rows(weight)
    itemsize, capability = dtype.itemsize, device_capability(codes)
    shape = (max(1, num_rows // experts), columns, depth)
    return Trial(
        key=_key("grouped_product", codes, shape, itemsize),
        default=ternary_experts.grouped_tiles(groups.mean_rows, capability, itemsize),
        run=lambda tiles: ternary_experts.grouped_int8_product(
            *(codes, ternary.codes, groups),
            **{"a_scale": scale, "b_scale": ternary.scale, "dtype": dtype},
            **{"by_token": True, "tiles": tiles},
        ),
        fixed_rows=True,
    )


def _loss_trials(
    tokens: int, width: int, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Trial]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    rows = min(tokens, max(1, fused_cross_entropy.MAX_GRADIENT_ENTRIES // vocabulary))
    hidden, labels = hidden[:rows], labels[:rows]
    store = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    normaliser, _ = fused_cross_entropy.logit_statistics(hidden, weight, labels)
    default = fused_cross_entropy.logits_tiles(device_capability(hidden), hidden.element_size())
    size = hidden.element_size()
    yield Trial(
        key=_key("logits", hidden, (rows, vocabulary, width), size),
        default=default,
        run=lambda tiles: fused_cross_entropy.logit_gradient(
            hidden, weight, labels, normaliser, out=store, tiles=tiles
        ),
    )
    scale = torch.ones((), device=device)
    for a, b, shape in (
        (store, weight, (rows, width, vocabulary)),
        (store.mT, hidden, (vocabulary, width, rows)),
    ):
        out = torch.empty(shape[0], width, dtype=torch.float32, device=device)
        yield Trial(
            key=_key("scaled_product", hidden, shape, size),
            default=default,
            run=lambda tiles, a=a, b=b, out=out: fused_cross_entropy.scaled_product(
                a, b, scale, out=out, add=False, tiles=tiles
            ),
        )


def measure(run: Callable[[], object]) -> float:
    """Median microseconds of a launch on the GPU, the first two left out."""
    times = []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[2:])


def tune(
    trial: Trial, clock: Callable[[Callable[[], object]], float]
) -> tuple[Tiles, dict[Tiles, float]]:
    """The tiles to use, and microseconds of all that this GPU can launch."""
    times: dict[Tiles, float] = {}
    for tiles in candidates(trial.default):
        if trial.fixed_rows and tiles.m != trial.default.m:
            continue
        try:
            times[tiles] = clock(lambda tiles=tiles: trial.run(tiles))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    best = min(times, key=lambda tiles: times[tiles]) if times else trial.default
    heuristic = times.get(trial.default)
    if heuristic is not None and times[best] > MARGIN * heuristic:
        best = trial.default
    return best, times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure launch settings of the kernels.")
    for name, value, text in (
        ("--tokens", 2048, "tokens of a micro-batch"),
        ("--d-model", 768, "model width"),
        ("--d-expert", 1024, "hidden width of an expert"),
        ("--vocab-size", 32768, "vocabulary"),
        ("--experts", 8, "routed experts, 0 = none"),
        ("--top-k", 2, "routed experts of a token"),
    ):
        parser.add_argument(name, type=int, default=value, help=f"{text}; {value}")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: tune_kernels.py needs a CUDA device; train without a table", file=sys.stderr)
        return 2
    prepare_caches()
    path = table_path(os.environ.get(FOLDER_VARIABLE))
    assert path is not None  # prepare_caches has set it
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, {processor_count(device)} multiprocessors -> {path}")
    table = LaunchTable.read(path)
    for trial in trials(options, device):
        best, times = tune(trial, measure)
        table.tiles[trial.key] = best
        gain = times[trial.default] / times[best] if trial.default in times else float("nan")
        size = f"{trial.key.rows} x {trial.key.columns} x {trial.key.depth}"
        print(f"{trial.key.operation:16} {size:24} {list(best)}  {gain:.2f} of the heuristic")
        table.write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
