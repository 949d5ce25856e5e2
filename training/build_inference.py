"""Loading what a run has trained, for everything that only reads it (see build.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.adapters import Adapter, attach
from model.sigma_llm import SigmaLLM
from training.build_data import build_tokenizer
from training.config.cli import load_json
from training.config.sigma_config import ConfigError, SigmaConfig
from training.runtime.checkpoint import CheckpointStore
from training.runtime.environment import resolve_device
from training.runtime.state_tree import join_state
from training.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True, frozen=True)
class TrainedModel:
    """model: on its device, in eval mode. step: of the checkpoint. config: the run's own."""

    model: SigmaLLM
    tokenizer: Tokenizer
    step: int
    config: SigmaConfig


def load_for_inference(config: SigmaConfig) -> TrainedModel:
    """The newest valid checkpoint of a run directory, with the weights that --weights asks for.

    The model's shape comes from `<output_dir>/config.json`, not from today's flags. Reads only.
    """
    saved = Path(config.run.output_dir) / "config.json"
    if not saved.is_file():
        raise ConfigError(f"--output-dir {config.run.output_dir} holds no run (no config.json)")
    trained = load_json(saved)
    device = resolve_device(config)
    tokenizer = build_tokenizer(trained)
    checkpoint = CheckpointStore.newest_for_inference(Path(config.run.checkpoint_dir))
    if checkpoint is None:
        raise ConfigError(
            f"--checkpoint-dir {config.run.checkpoint_dir} holds no valid checkpoint; train first"
        )
    model = SigmaLLM(trained.model_config(tokenizer.vocab_size), seed=0)
    model.load_state_dict(checkpoint.tensors["model"])
    model.to(device).eval()
    if config.generate.weights != "last":
        features = join_state(checkpoint.tensors["features"], checkpoint.state["features"])
        if config.generate.weights == "ema":
            _load_average(model, features)
        else:
            _attach_merged(model, features, trained)
    return TrainedModel(model=model, tokenizer=tokenizer, step=checkpoint.step, config=trained)


def _load_average(model: SigmaLLM, features: dict[str, Any]) -> None:
    shadow = features.get("ema", {"state": {"shadow": {}}})["state"]["shadow"]
    if not shadow:
        raise ConfigError("--weights ema: this run kept no average; train with --ema-enabled")
    model.load_state_dict(shadow, strict=False)


def _attach_merged(model: SigmaLLM, features: dict[str, Any], trained: SigmaConfig) -> None:
    """Add the adapter that Hydra has merged from those of its domains."""
    found = features.get("hydra_v21", {"state": {"learner": {"merged": {}}}})
    merged = found["state"]["learner"]["merged"]
    if not merged:
        raise ConfigError(
            "--weights hydra: this checkpoint has no merged adapter; train with --hydra-enable "
            "past a multiple of --hydra-steps-per-phase, without --merge-fold-into-backbone"
        )
    own = trained.hydra
    generator = torch.Generator().manual_seed(0)  # what it draws is written over
    adapter = Adapter.create(model, rank=own.lora_rank, alpha=own.lora_alpha, generator=generator)
    adapter.load_state_dict(merged)
    attach(model, adapter)
