"""`--mode export`: the newest checkpoint as a directory that transformers loads.

Weights in safetensors, settings and tokenizer under the names that `from_pretrained` looks for. The
network is none that transformers brings along, so loading wants this project's `model` on the path
and `model.hf.register()` first; the directory's README says so. It holds no code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from training.build import load_for_inference
from training.config.cli import load_json
from training.config.sigma_config import ConfigError, SigmaConfig
from training.tokenizer import Tokenizer

README = """SigmaLLM: {num_parameters:,} parameters, {step:,} steps, context {seq_len} tokens.

    from model.hf import register   # of the project that trained it
    register()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{name}")
    tokenizer = AutoTokenizer.from_pretrained("{name}")

It was trained on plain text: begin a prompt with tokenizer.bos_token.
"""


def run(config: SigmaConfig) -> int:
    """Write `<output_dir>/export/step_<N>` and print its path."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "--mode export needs transformers, which this program lacks: run it from source, "
            "after python scripts/launch.py train"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer, step = load_for_inference(config)
    trained = load_json(Path(config.run.output_dir) / "config.json")
    average = "_ema" if config.generate.weights == "ema" else ""
    target = Path(config.run.output_dir) / "export" / f"step_{step:08d}{average}"
    if target.exists():
        raise ConfigError(f"{target} exists: that step was exported before; move it away first")
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was stopped
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, model.cpu(), tokenizer, seq_len=trained.data.seq_len)
        notes = README.format(
            step=step,
            num_parameters=sum(weight.numel() for weight in model.parameters()),
            seq_len=trained.data.seq_len,
            name=target.name,
        )
        (unfinished / "README.md").write_text(notes, encoding="utf-8")
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(json.dumps({"export": str(target)}) if config.run.json else target)
    return 0


def _write(directory: Path, model: Any, tokenizer: Tokenizer, *, seq_len: int) -> None:
    from model.hf import SigmaForCausalLM
    from training.rl.trl_sigma import transformers_tokenizer

    end_id = tokenizer.end_id
    ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    exported = SigmaForCausalLM.from_sigma(model, max_position_embeddings=seq_len, **ids)
    exported.save_pretrained(directory)
    written = transformers_tokenizer(tokenizer, stop_id=end_id)
    written.model_max_length = seq_len
    written.save_pretrained(directory)
