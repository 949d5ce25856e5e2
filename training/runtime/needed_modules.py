"""The third-party modules and symbols that SIGMA needs, as data: for the build and the program.

One list, two readers. `scripts/verify_runtime.py` holds it against an installed environment before
the EXE is packed; `--mode doctor --self-check` holds the program's part of it against the packed
EXE. Symbols are named where versions of the package are known to differ or a packer to lose them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, frozen=True)
class NeededModule:
    """A module, the distribution it comes from, and dotted names that must be found in it.

    elsewhere: the distribution's name on other systems than Windows, where it differs.

    part: "program" (it trains with it), "hugging-face" (the model's face to transformers, not in
    the EXE), "kernels" (only where there is Triton), "fine-tuning", "build". needs_gpu: the module
    refuses to be imported on a machine without CUDA, so that there it can only be seen to be there.
    """

    module: str
    distribution: str
    symbols: tuple[str, ...]
    elsewhere: str = ""
    part: str = "program"
    needs_gpu: bool = False


TRAINERS = (
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "ORPOTrainer",
    "PPOTrainer",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
)
PROGRAM = (
    NeededModule(
        module="torch",
        distribution="torch",
        symbols=(
            "Tensor",
            "_foreach_lerp_",
            "amp.GradScaler",
            "compile",
            "library.custom_op",
            "linalg.vecdot",
            "nn.Module",
            "nn.functional.scaled_dot_product_attention",
            "optim.AdamW",
        ),
    ),
    NeededModule(module="torch.utils.checkpoint", distribution="torch", symbols=("checkpoint",)),
    NeededModule(module="numpy", distribution="numpy", symbols=("frombuffer", "memmap")),
    NeededModule(module="filelock", distribution="filelock", symbols=("FileLock", "Timeout")),
    NeededModule(module="jinja2", distribution="jinja2", symbols=("Environment",)),
    NeededModule(module="orjson", distribution="orjson", symbols=("dumps", "loads")),
    NeededModule(
        module="psutil",
        distribution="psutil",
        symbols=("Process.memory_info", "cpu_percent", "virtual_memory"),
    ),
    NeededModule(
        module="pynvml",
        distribution="nvidia-ml-py",
        symbols=("NVMLError", "nvmlInit", "nvmlSystemGetDriverVersion"),
    ),
    NeededModule(module="rich.live", distribution="rich", symbols=("Live",)),
    NeededModule(module="rich.console", distribution="rich", symbols=("Console", "Group")),
    NeededModule(
        module="tokenizers",
        distribution="tokenizers",
        symbols=(
            "Regex",
            "Tokenizer.encode_batch_fast",
            "decoders",
            "models",
            "pre_tokenizers",
            "trainers",
        ),
    ),
)
HUGGING_FACE = tuple(
    NeededModule(module=module, distribution="transformers", symbols=symbols, part="hugging-face")
    for module, symbols in (
        (
            "transformers",
            ("AutoConfig", "AutoModelForCausalLM", "PreTrainedModel", "PretrainedConfig"),
        ),
        ("transformers.generation.utils", ("GenerationMixin",)),
        ("transformers.modeling_outputs", ("MoeCausalLMOutputWithPast",)),
    )
)
KERNELS = tuple(
    NeededModule(
        module=module,
        distribution="triton-windows",
        elsewhere="triton",
        symbols=symbols,
        part="kernels",
    )
    for module, symbols in (
        ("triton", ("cdiv", "compile", "jit", "language.load", "runtime.build")),
        ("triton.backends.compiler", ("GPUTarget",)),
        ("triton.compiler", ("ASTSource",)),
    )
)
FINE_TUNING = tuple(
    NeededModule(
        module=module,
        distribution=distribution,
        symbols=symbols,
        part="fine-tuning",
        needs_gpu=module == "unsloth",
    )
    for module, distribution, symbols in (
        ("torchvision", "torchvision", ("transforms",)),
        ("torchaudio", "torchaudio", ("functional",)),
        ("safetensors.torch", "safetensors", ("load_file", "save_file")),
        ("accelerate", "accelerate", ("Accelerator",)),
        ("bitsandbytes", "bitsandbytes", ("optim.AdamW8bit",)),
        ("datasets", "datasets", ("IterableDataset", "load_dataset")),
        ("pandas", "pandas", ("DataFrame",)),
        ("peft", "peft", ("LoraConfig", "get_peft_model")),
        ("pyarrow", "pyarrow", ("Table",)),
        ("pyarrow.parquet", "pyarrow", ("ParquetFile",)),
        ("trl", "trl", TRAINERS),
        ("xformers.ops", "xformers", ("memory_efficient_attention",)),
        # unsloth_zoo can only be imported by unsloth, so its version is all there is to look at.
        ("unsloth", "unsloth", ("FastLanguageModel",)),
    )
)
BUILD = (
    NeededModule(
        module="PyInstaller.__main__", distribution="pyinstaller", symbols=("run",), part="build"
    ),
    NeededModule(
        module="_pyinstaller_hooks_contrib",
        distribution="pyinstaller-hooks-contrib",
        symbols=("get_hook_dirs",),
        part="build",
    ),
)
NEEDED = (*PROGRAM, *HUGGING_FACE, *KERNELS, *FINE_TUNING, *BUILD)
