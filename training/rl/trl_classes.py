"""The classes of TRL that `--grpo-backend trl` needs, or one line that says what is missing."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from training.rl.unsloth_bridge import is_patched, original_grpo

MISSING = "GRPO backend is set to 'trl' but TRL GRPO classes are unavailable."
OLDEST = (0, 24)


def trl_classes() -> tuple[Any, Any, Any]:
    """TRL's own GRPOConfig and GRPOTrainer, and the callback that prints.

    RuntimeError if they cannot be had. Where unsloth has put its classes in their place, the
    original ones: unsloth's know the architectures it supports, and Sigma is none of them.
    """
    try:
        import trl
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer
    except (ImportError, RuntimeError) as error:  # a lazy import of transformers' kind raises these
        reason = " ".join(str(error).split())
        raise RuntimeError(f"{MISSING} {_mend(f'no GRPOTrainer: {reason}')}") from error
    if _version(trl.__version__) < OLDEST:
        raise RuntimeError(f"{MISSING} {_mend(f'trl {trl.__version__} is too old')}")
    if is_patched(GRPOTrainer):
        GRPOConfig, GRPOTrainer = original_grpo()
    return GRPOConfig, GRPOTrainer, PrinterCallback


def prepare_reference(policy: Any, *, temperature: float) -> None:
    """Make a model answer as TRL asks its reference to, which from 1.x on is not for logits."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return
    add_fused_lm_head(policy, temperature=temperature)


def _mend(reason: str) -> str:
    return (
        f"--grpo-backend trl needs GRPOTrainer of trl 0.24 or newer ({reason}): install the "
        "fine-tuning packages of the lockfile, or use --grpo-backend internal"
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
