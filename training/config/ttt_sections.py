"""Settings of test-time training: what `--mode eval` may learn from a text that it has scored."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class TTTConfig:
    enabled: bool = flag(
        False, "In --mode eval, score the text once more, learning from each chunk after its score."
    )
    chunk_tokens: int = flag(32768, "Tokens that are scored before they are learned.", minimum=1)
    epochs: int = flag(3, "Times over a chunk.", minimum=1)
    lr: float = flag(0.002, "Learning rate of SGD; a cosine over the chunks.", above=0.0)
    momentum: float = flag(0.9, "Momentum of SGD.", minimum=0.0, below=1.0)
    grad_clip: float = flag(1.0, "Largest norm of a gradient.", above=0.0)
    scope: str = flag(
        "vectors",
        "Weights that learn: vectors (norms, steps, decays; no ternary code changes) or all.",
        choices=("vectors", "all"),
    )
