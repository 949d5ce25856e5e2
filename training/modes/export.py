"""`--mode export`: the newest checkpoint as a directory that transformers loads.

Weights in safetensors, settings and tokenizer under the names that `from_pretrained` looks for. The
network is none that transformers brings along, so loading wants this project's `model` on the path
and `model.hf.register()` first; the directory's README says so. It holds no code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from training.build_inference import TrainedModel, load_for_inference
from training.config.sigma_config import ConfigError, SigmaConfig
from training.runtime.atomic_io import FileOps

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
    if config.generate.weights == "hydra":
        raise ConfigError(
            "--mode export writes no adapters: train with --merge-fold-into-backbone, or export "
            "--weights last"
        )
    loaded = load_for_inference(config)
    average = "_ema" if config.generate.weights == "ema" else ""
    target = Path(config.run.output_dir) / "export" / f"step_{loaded.step:08d}{average}"
    if target.exists():
        raise ConfigError(f"{target} exists: that step was exported before; move it away first")
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was stopped
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, loaded)
        notes = README.format(
            step=loaded.step,
            num_parameters=sum(weight.numel() for weight in loaded.model.parameters()),
            seq_len=loaded.config.data.seq_len,
            name=target.name,
        )
        (unfinished / "README.md").write_text(notes, encoding="utf-8")
        FileOps().move_dir(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(json.dumps({"export": str(target)}) if config.run.json else target)
    return 0


def _write(directory: Path, loaded: TrainedModel) -> None:
    from model.hf import SigmaForCausalLM
    from training.rl.trl_sigma import transformers_tokenizer

    end_id, seq_len = loaded.tokenizer.end_id, loaded.config.data.seq_len
    ids = {"bos_token_id": end_id, "eos_token_id": end_id, "pad_token_id": end_id}
    model = loaded.model.cpu()
    exported = SigmaForCausalLM.from_sigma(model, max_position_embeddings=seq_len, **ids)
    exported.save_pretrained(directory)
    written = transformers_tokenizer(loaded.tokenizer, stop_id=end_id)
    written.model_max_length = seq_len
    written.save_pretrained(directory)
