"""What integration tests do with runs: start them, stop them, and compare what they left."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.build import build_trainer
from training.config.cli import parse_args
from training.features import FEATURES
from training.features.base import Feature, Schedule

TINY = """
--no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k
--d-model 32 --n-heads 2 --n-layers 2 --mamba-ratio 1 --attention-ratio 1
--kv-latent-dim 16 --rope-dim 8 --mamba-head-dim 16 --mamba-d-state 8 --mamba-chunk-len 16
--mimo-rank 2 --d-ff 48 --n-routed-experts 4 --moe-top-k 2
--engram-enabled --engram-orders 2,3 --engram-heads 2 --engram-buckets 64 --engram-dim 8
--seq-len 32 --batch-size 2 --grad-accum-steps 2 --steps 64 --warmup-steps 4
--log-interval 1 --save-interval 8 --max-checkpoints 100
--eval-interval 16 --eval-tokens 256 --sample-interval 32 --sample-tokens 4
--ema-enabled --ema-start-fraction 0.25 --curriculum-enabled --dropout 0.05
--no-strict-feature-usage --integrity-hidden-eval-every 0
"""
# What needs probe text, which only the embedded text has, so not in TINY.
REPLAY = ("--causal-replay-enabled", "--probe-batches", "4")
WALL_CLOCK = (
    "_s", "_ms", "tokens_per_s", "time_utc", "cpu_percent", "ram_", "gpu_", "_per_s_ema", "perf_",
    "speed_gain", "data_queue_depth",
)  # fmt: skip


def tiny_flags(directory: Path, *more: str) -> list[str]:
    """Flags of a run of seconds with experts, memory, average and curriculum."""
    paths = ["--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    return [*TINY.split(), *paths, *more]


def train(args: list[str], *, features: tuple[type[Feature], ...] = FEATURES) -> None:
    build_trainer(parse_args(args), features=features).fit()


def stop_after(step: int, output_dir: Path) -> type[Feature]:
    """A feature that asks for a stop, as a user would, once `step` is done."""

    class StopAfter(Feature):
        name = "stop_after"

        @classmethod
        def schedule(cls, config):
            return Schedule()

        def after_step(self, ctx):
            if ctx.step == step:
                (output_dir / "STOP").touch()
            return False

    return StopAfter


def newest_checkpoint(output_dir: Path) -> Path:
    return max((output_dir / "checkpoints").glob("checkpoint_step_*"))


def differences(first: Path, second: Path) -> list[str]:
    """Names of all tensors, plain state values and metrics rows in which two runs differ.

    Wall-clock columns are left out; everything else must agree to the last bit.
    """
    one, two = newest_checkpoint(first), newest_checkpoint(second)
    return checkpoint_differences(one, two, rows=row_differences(first, second))


def checkpoint_differences(one: Path, two: Path, *, rows: list[int]) -> list[str]:
    """`differences` of two checkpoints, with the steps whose rows differ between tensors and
    cursor."""
    found = []
    for path in sorted(one.glob("*.safetensors")):
        ours, theirs = _tensors(path), _tensors(two / path.name)
        if ours.keys() != theirs.keys():
            return [f"{path.name}: other tensors"]
        found += [
            f"{path.stem}/{name}"
            for name in ours
            if ours[name].dtype != theirs[name].dtype or not _same_bits(ours[name], theirs[name])
        ]
    found += [f"row {row}" for row in rows]
    streams = [_stream_position(path) for path in (one, two)]
    return found + ([] if streams[0] == streams[1] else ["stream position"])


def metrics_rows(output_dir: Path) -> list[dict]:
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def row_differences(first: Path, second: Path, *, last: int = 2**62) -> list[int]:
    ours, theirs = (_comparable(metrics_rows(path)) for path in (first, second))
    steps = sorted(step for step in {*ours, *theirs} if step <= last)
    return [step for step in steps if ours.get(step) != theirs.get(step)]


def _comparable(rows: list[dict]) -> dict[int, dict]:
    assert len({row["step"] for row in rows}) == len(rows), "a step was recorded twice"
    return {
        row["step"]: {
            name: value
            for name, value in row.items()
            if not any(part in name for part in WALL_CLOCK) and "stop_after" not in name
        }
        for row in rows
        if row["step"] > 0
    }


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(path).items() if "stop_after" not in name}


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


def _stream_position(checkpoint: Path) -> str:
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    text = json.dumps(state, sort_keys=True)
    start = text.index('"stream"')
    return text[start : start + 600]
