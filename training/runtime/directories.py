"""Whether the directories of a run can take what it will write, asked before anything is written.

Permission bits say little (root, read-only mounts, Windows), so the nearest existing directory is
probed with a temporary file that has vanished again when the answer is there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from model.config import SigmaModelConfig
from training.config.sections import SOAP_MAX_SIDE, OptimConfig
from training.config.sigma_config import SigmaConfig
from training.runtime.environment import CACHE_DIRECTORY, EnvironmentProblem
from training.runtime.frozen import bundle_directory
from training.runtime.locks import CHECKPOINT_LOCK_NAME, RunLock

MIB = 2**20
LOG_BYTES = 16 * MIB
# One checkpoint is being written while the newest one must stay.
CHECKPOINTS_AT_ONCE = 2
VOCAB_SIZES = {"assets-4k": 4096}


def check_directories(config: SigmaConfig, *, folder: str = "") -> None:
    """EnvironmentProblem when a run directory is not writable or clearly lacks space; RuntimeError
    when another process trains in it.

    folder: within the checkpoint directory, for what keeps its own checkpoints apart there.
    """
    run = config.run
    needs = [
        ("--output-dir", run.output_dir, LOG_BYTES),
        ("--checkpoint-dir", run.checkpoint_dir, CHECKPOINTS_AT_ONCE * checkpoint_bytes(config)),
    ]
    if config.perf.perf_profile_enable and config.perf.perf_report_dir:
        needs.append(("--perf-report-dir", config.perf.perf_report_dir, MIB))
    for flag, directory, needed in needs:
        problem = write_problem(Path(directory))
        if problem:
            raise EnvironmentProblem(
                f"{flag} {directory} cannot be written: {problem}", f"choose another {flag}"
            )
        free = free_bytes(Path(directory))
        if free < needed:
            raise EnvironmentProblem(
                f"{flag} {directory} has {free // MIB} MiB free of about {needed // MIB} needed",
                f"free space or choose another {flag}",
            )
    RunLock(Path(run.output_dir)).check_free()
    RunLock(Path(run.checkpoint_dir) / folder, name=CHECKPOINT_LOCK_NAME).check_free()


def perf_directory(config: SigmaConfig) -> Path:
    """Where the reports of a performance window go."""
    return Path(config.perf.perf_report_dir or Path(config.run.output_dir) / "perf")


def cache_directory(config: SigmaConfig) -> Path:
    """Where kernel and compiler caches go: `.runtime_cache` in the working directory.

    A packed program may be started from anywhere, by a shortcut even from Windows' own folder, and
    must not write among its own modules: it takes the first that can be written of the working
    directory, the folder of its EXE and that of the outputs.
    """
    bundle = bundle_directory()
    if bundle is None:
        return CACHE_DIRECTORY
    outputs = Path(config.run.output_dir).absolute()
    for folder in (Path.cwd(), Path(sys.executable).parent, outputs):
        if not folder.resolve().is_relative_to(bundle.resolve()) and not write_problem(folder):
            return folder / CACHE_DIRECTORY
    return CACHE_DIRECTORY


def write_problem(directory: Path) -> str:
    """Why no file can be made in `directory` or in what it would be made in; "" if one can."""
    try:
        parent = nearest_existing(directory)
        if not parent.is_dir():
            return f"{parent} is not a directory"
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"\0")
    except OSError as error:
        return error.strerror or str(error)
    return ""


def nearest_existing(path: Path) -> Path:
    """The path itself or the first of its parents that exists; OSError if that cannot be told."""
    path = path.absolute()
    while not path.exists() and path.parent != path:
        path = path.parent
    return path


def free_bytes(directory: Path) -> int:
    """Free space of the file system that `directory` is or would be on."""
    return shutil.disk_usage(nearest_existing(directory)).free


def checkpoint_bytes(config: SigmaConfig) -> int:
    """About how large one checkpoint is: fp32 weights, optimizer moments, the average if kept, and
    two moments and reference weights with RL.

    A close estimate from the shape alone (`--mode plan` has the exact figure of the built model).
    """
    model = config.model_config(_vocab_size(config))
    shapes, tables = matrix_shapes(model), table_parameters(model)
    copies = 1 + config.ema.enabled + (3 if config.ttrl.interval else 0)
    moments = sum(count * _state_bytes(config.optim, *sides) for count, *sides in shapes)
    beside = _moment_bytes(config.optim) if "lion" in config.optim.optimizer else 8  # AdamW's two
    weights = matrix_parameters(model) + tables
    return 4 * copies * weights + moments + beside * tables


def _moment_bytes(optim: OptimConfig) -> int:
    return 2 if optim.lion_state_dtype == "bf16" else 4


def _state_bytes(optim: OptimConfig, rows: int, cols: int) -> int:
    """What `--optimizer` keeps for one matrix of a block."""
    size, short, long = rows * cols, min(rows, cols), max(rows, cols)
    match optim.optimizer:
        case "muon" | "normuon":
            return 4 * size
        case "soap":  # two moments; a factor and its basis for each side
            return 8 * size + 8 * sum(n * n for n in (rows, cols) if n <= SOAP_MAX_SIDE)
        case "galore-lion" if optim.galore_rank < short:
            return optim.galore_rank * (_moment_bytes(optim) * long + 4 * short)
        case "lion" | "galore-lion":
            return _moment_bytes(optim) * size
    return 8 * size


def training_bytes(config: SigmaConfig) -> int:
    """About how much memory weights, gradients and optimizer state take, without activations."""
    model = config.model_config(_vocab_size(config))
    return checkpoint_bytes(config) + 4 * (matrix_parameters(model) + table_parameters(model))


def matrix_parameters(model: SigmaModelConfig) -> int:
    """About how many parameters the blocks have: their projections, not norms and gates."""
    return sum(count * rows * cols for count, rows, cols in matrix_shapes(model))


def matrix_shapes(model: SigmaModelConfig) -> list[tuple[int, int, int]]:
    """Projections of all blocks: how many there are of which number of rows and columns."""
    d = model.d_model
    ffn = [(1, 2 * model.d_ff, d), (1, d, model.d_ff)]
    if model.n_routed_experts:
        width, shared = model.d_expert, model.n_shared_experts * model.d_expert
        ffn = [(model.n_routed_experts, 2 * width, d), (model.n_routed_experts, d, width)]
        ffn += [(1, 2 * shared, d), (1, d, shared)] if shared else []
    state = 2 * model.mamba_d_state * model.mimo_rank
    mamba = [(1, 2 * model.d_inner + state + 2 * model.mamba_heads, d), (1, d, model.d_inner)]
    latent = model.kv_latent_dim
    queries = model.n_heads * (model.d_head + model.rope_dim)
    attention = [(1, queries, d), (1, latent + model.rope_dim, d), (2, d, latent), (1, d, d)]
    return [
        shape
        for kind in model.layer_kinds()
        for shape in (*ffn, *(mamba if kind == "mamba" else attention))
    ]


def table_parameters(model: SigmaModelConfig) -> int:
    """Parameters of the embedding, an untied head and the n-gram tables."""
    tables = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    if model.engram_enabled:
        rows = len(model.engram_orders) * model.engram_heads * model.engram_buckets
        tables += rows * model.engram_dim * len(model.engram_layers)
    return tables


def _vocab_size(config: SigmaConfig) -> int:
    return VOCAB_SIZES.get(config.data.tokenizer_name, SigmaModelConfig().vocab_size)
