"""Flags of the smallest run that trains: one attention block, steps of milliseconds."""

from pathlib import Path

SMALL = """
--no-require-cuda --device cpu --tokenizer-name assets-4k --d-model 16 --n-heads 2 --n-layers 1
--mamba-ratio 0 --attention-ratio 1 --mamba-head-dim 16 --kv-latent-dim 8 --rope-dim 4 --d-ff 16
--n-routed-experts 0 --moe-top-k 1 --seq-len 16 --batch-size 2 --dropout 0.1 --instant-mode off
--lr 0.05 --adam-lr 0.02 --warmup-steps 2 --log-interval 1 --max-checkpoints 100
--eval-interval 0 --eval-tokens 64 --sample-interval 0 --sample-tokens 1
--probe-batches 4 --probe-batch-size 2 --no-strict-feature-usage
--integrity-hidden-eval-every 0 --no-integrity-guards-enabled
"""


def small_flags(directory: Path, *more: str) -> list[str]:
    """The flags of a run in `directory`: the paths first, then the rest."""
    paths = ["--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    return [*paths, *SMALL.split(), *more]
