"""One real SFT step and one real GRPO step of a small Sigma model by TRL's trainers, as proof.

`python scripts/prove_trl_steps.py` takes the trainers that `trl` gives out: on a machine with CUDA
and unsloth those are unsloth's, elsewhere TRL's own. That trainers are patched by name does not
show that they run, so this says for each whether a step moved the weights, or how it failed. Prints
one JSON object; exit code 0 if both steps were taken, 1 if not, and with
--require-unsloth-trl-patch also 1 when the patch is not active.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from training.rl.unsloth_bridge import load_unsloth  # noqa: E402

TEXTS = ("17+5=22", "3+4=7 and 9-2=7", "a sum of two numbers", "8+6=14")
PROMPTS = ("17+5=", "3+4=", "a sum of", "8+6=")
GROUP = 4


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Take one SFT and one GRPO step through trl.")
    parser.add_argument("--require-unsloth-trl-patch", action="store_true")
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        try:
            patch = load_unsloth(
                required=options.require_unsloth_trl_patch,
                cuda=cuda,
                cache_directory=Path(folder) / "unsloth",
            )
        except RuntimeError as error:
            print(f"prove_trl_steps: {error}", file=sys.stderr)
            return 1
        device = torch.device("cuda" if cuda else "cpu")
        steps = {
            "sft": attempt(sft_step, device=device, folder=Path(folder)),
            "grpo": attempt(grpo_step, device=device, folder=Path(folder)),
        }
    print(json.dumps(patch.metrics() | {"reason": patch.reason, "device": str(device)} | steps))
    return 0 if all(step["moved_weights"] for step in steps.values()) else 1


def attempt(step: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    """What the step did, or the last line of how it failed."""
    try:
        return step(**options)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, KeyError):
        return {"moved_weights": False, "failure": traceback.format_exc().splitlines()[-1]}


def small_model(device: torch.device) -> tuple[Any, Any]:
    """A SigmaForCausalLM of some thousand weights and the shipped 4k tokenizer."""
    from model.config import SigmaModelConfig
    from model.hf import SigmaForCausalLM
    from model.sigma_llm import SigmaLLM
    from training.rl.trl_sigma import transformers_tokenizer
    from training.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_name("assets-4k")
    config = SigmaModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        n_layers=3,
        n_heads=2,
        mamba_ratio=2,
        d_ff=48,
        n_routed_experts=4,
        mamba_head_dim=16,
        mamba_d_state=16,
        mimo_rank=2,
        kv_latent_dim=16,
        rope_dim=8,
    )
    end = tokenizer.end_id
    model = SigmaForCausalLM.from_sigma(
        SigmaLLM(config.validate(), seed=0),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model.train()
    torch.nn.Module.to(model, device)
    return model, transformers_tokenizer(tokenizer, stop_id=end)


def quiet(device: torch.device, folder: Path, name: str) -> dict[str, Any]:
    """Arguments of one step that saves and reports nothing."""
    return {
        "output_dir": str(folder / name),
        "max_steps": 1,
        "per_device_train_batch_size": GROUP,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


def sft_step(*, device: torch.device, folder: Path) -> dict[str, Any]:
    """`taken` of one step of SFTTrainer on TEXTS; `folder` receives what the trainer writes."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = small_model(device)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**quiet(device, folder, "sft")),
        train_dataset=Dataset.from_dict({"text": list(TEXTS)}),
        processing_class=tokenizer,
    )
    return taken(trainer, model)


def grpo_step(*, device: torch.device, folder: Path) -> dict[str, Any]:
    """Rewards alternate inside a group, so that there is something to learn."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def alternating(completions: Sequence[Any], **_: Any) -> list[float]:
        return [2.0 if number % 2 else -1.0 for number in range(len(completions))]

    model, tokenizer = small_model(device)
    arguments = quiet(device, folder, "grpo")
    arguments |= {"num_generations": GROUP, "max_completion_length": 4, "beta": 0.0}
    # Prompts of different length: rows are padded on the left.
    arguments["gradient_accumulation_steps"] = len(PROMPTS)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=alternating,
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
    )
    return taken(trainer, model)


def taken(trainer: Any, model: Any) -> dict[str, Any]:
    """Take the step; whether it moved finite weights, and what the trainer logged of it."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    after = dict(model.named_parameters())
    logged = trainer.state.log_history[0]
    return {
        "trainer": type(trainer).__name__,
        "moved_weights": any(not torch.equal(value, after[name]) for name, value in before.items())
        and all(bool(value.isfinite().all()) for value in after.values()),
        **{name: logged[name] for name in ("loss", "grad_norm", "reward") if name in logged},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
