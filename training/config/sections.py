"""The settings of a run, grouped by what they belong to.

A setting stands here only if something reads it. Ranges of a single value are declared with it;
rules between settings live in `SigmaConfig.validate`, rules about a network's shape in
`SigmaModelConfig.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import DISPATCH_MODES, GATE_PRECISIONS, QUANT_MODES, RESIDUAL_LAYOUTS
from training.config.fields import ConfigError, flag

MODES = (
    "train",
    "plan",
    "doctor",
    "data",
    "eval",
    "generate",
    "chat",
    "export",
    "report",
    "watch",
    "support",
)


@dataclass(slots=True, kw_only=True)
class RunConfig:
    mode: str = flag("train", "What to do with the run.", choices=MODES)
    device: str = flag("cuda", "Torch device: auto (CUDA if there is one), cpu, cuda or cuda:N.")
    require_cuda: bool = flag(True, "Refuse to start without CUDA.")
    seed: int = flag(1337, "Master random seed.", minimum=0, maximum=2**63 - 1)
    steps: int = flag(2000, "Number of optimizer steps of the run.", minimum=1)
    log_interval: int = flag(10, "Write a metrics.jsonl row every N steps.", minimum=1)
    output_dir: str = flag("runs/sigma", "Run directory: metrics, errors, report.", is_path=True)
    checkpoint_dir: str = flag("checkpoints", "Directory of checkpoint_step_*.", is_path=True)
    save_interval: int = flag(100, "Save a checkpoint every N steps.", minimum=1)
    max_checkpoints: int = flag(5, "Number of newest valid checkpoints kept.", minimum=2)
    no_resume: bool = flag(False, "Start fresh instead of resuming the newest valid checkpoint.")
    json: bool = flag(False, "Print what plan, doctor, data, eval, watch and others find as JSON.")
    self_check: bool = flag(
        False, "With --mode doctor: examine the program itself, as after packing it."
    )
    proof_mode: bool = flag(False, "Fail at the end if an enabled feature never had an effect.")
    crash_report_enabled: bool = flag(True, "Write errors/crash_step_*.json on a failure.")
    supervised: bool = flag(
        False, "Train in a child process, so that even a killed run leaves a crash report."
    )
    memory_soft_limit: float = flag(
        0.90,
        "Share of memory above which caches are cleared and micro-batches made smaller; 1 = never.",
        above=0.0,
        maximum=1.0,
    )
    memory_hard_limit: float = flag(
        0.97,
        "Share of memory above which the run saves and ends; 1 = never.",
        above=0.0,
        maximum=1.0,
    )
    hang_timeout_sec: float = flag(
        900.0,
        "Seconds without a step after which all stacks are written to errors/; 0 = never.",
        minimum=0.0,
    )
    metrics_ema_beta: float = flag(
        0.90, "Decay per step of loss_ema and tokens_per_s_ema.", minimum=0.0, below=1.0
    )


@dataclass(slots=True, kw_only=True)
class DataConfig:
    tokenizer_name: str = flag(
        "assets", "Vocabulary: assets (= assets-32k), assets-4k, or a tokenizer.json.", is_path=True
    )
    seq_len: int = flag(512, "Sequence length in tokens.", minimum=2, maximum=2**20)
    batch_size: int = flag(4, "Sequences per micro-batch.", minimum=1, maximum=2**20)
    grad_accum_steps: int = flag(1, "Micro-batches per optimizer step.", minimum=1, maximum=2**20)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Fields carry the names and defaults of model.config.SigmaModelConfig."""

    d_model: int = flag(768, "Residual width.", minimum=1, maximum=2**20)
    n_heads: int = flag(12, "Attention heads (head width = d_model / n_heads).", minimum=1)
    n_layers: int = flag(18, "Number of blocks.", minimum=1, maximum=10**4)
    mamba_ratio: int = flag(5, "Mamba blocks per pattern period.", minimum=0, maximum=10**4)
    attention_ratio: int = flag(1, "MLA blocks per pattern period.", minimum=0, maximum=10**4)
    residual_layout: str = flag("two-stream", "Residual form of a block.", choices=RESIDUAL_LAYOUTS)
    dropout: float = flag(0.0, "Dropout probability.", minimum=0.0, below=1.0)
    tie_embeddings: bool = flag(True, "Use the embedding as the LM head's weight.")
    quant_mode: str = flag(
        "bitnet_1_58", "BitLinear weights: ternary, or none (full precision).", choices=QUANT_MODES
    )
    bitlinear_group_size: int = flag(
        0, "Weights per scale along the input; 0 = one scale per output row.", minimum=0
    )
    kv_latent_dim: int = flag(128, "Width of MLA's latent keys and values.", minimum=1)
    rope_dim: int = flag(32, "Width of the shared rotary key.", minimum=2)
    diff_attention_enabled: bool = flag(True, "Differential MLA; off = plain MLA.")
    diff_attention_lambda_init: float = flag(0.35, "Initial lambda per token and head.")
    diff_attention_lambda_min: float = flag(0.05, "Lower bound of lambda.")
    diff_attention_lambda_max: float = flag(1.20, "Upper bound of lambda.")
    mamba_expand: int = flag(2, "Inner width of a Mamba block / d_model.", minimum=1, maximum=64)
    mamba_head_dim: int = flag(64, "Channels per Mamba head.", minimum=1)
    mamba_d_state: int = flag(128, "State width per Mamba head.", minimum=1)
    mamba_chunk_len: int = flag(128, "Tokens per chunk of the scan.", minimum=1)
    mimo_rank: int = flag(4, "MIMO rank of the Mamba block.", minimum=1)
    mamba_step_scale: float = flag(0.05, "Initial value of the learnable Mamba residual scale.")
    d_ff: int = flag(3072, "Active FFN width; an expert has d_ff / (n_shared + top_k).", minimum=1)
    n_shared_experts: int = flag(1, "Always-on experts.", minimum=0, maximum=10**4)
    n_routed_experts: int = flag(
        8, "Routed experts; 0 = one dense SwiGLU of width d_ff.", minimum=0, maximum=10**4
    )
    moe_top_k: int = flag(2, "Routed experts per token.", minimum=1, maximum=10**4)
    moe_dispatch_mode: str = flag(
        "grouped", "Expert dispatch; all are numerically equal.", choices=DISPATCH_MODES
    )
    router_balance_lr: float = flag(
        1e-3, "Step of the selection bias per optimizer step.", minimum=0.0
    )
    router_jitter_noise: float = flag(
        0.01, "Relative multiplicative router noise in training.", minimum=0.0, below=1.0
    )
    moe_gate_precision: str = flag(
        "bf16", "Storage of the gate weights; arithmetic is fp32.", choices=GATE_PRECISIONS
    )
    rib_router_enabled: bool = flag(False, "Add the RIB regulariser and router temperature.")
    rib_info_weight: float = flag(0.03, "Weight of the information term.", minimum=0.0)
    rib_collapse_penalty: float = flag(0.08, "Weight of the max-min probability term.", minimum=0.0)
    rib_confidence_weight: float = flag(0.03, "Weight of the confidence term.", minimum=0.0)
    rib_temp_gain: float = flag(
        0.55, "Gain of the router temperature, which stays in [0.8, 1.35].", minimum=0.0
    )
    engram_enabled: bool = flag(False, "Add hashed n-gram memories (Engram).")
    engram_orders: tuple[int, ...] = flag(
        (2, 3, 4), "Lengths of the hashed n-grams in tokens.", minimum=1, maximum=64
    )
    engram_heads: int = flag(4, "Hash functions per n-gram length.", minimum=1, maximum=64)
    engram_buckets: int = flag(3072, "Rows per hash table.", minimum=1)
    engram_dim: int = flag(112, "Width of a table row.", minimum=1)
    engram_layers: tuple[int, ...] = flag(
        (1,), "Blocks that read the memory, counted from 0.", minimum=0
    )
    engram_canonical: bool = flag(
        False, "One n-gram key for tokens that differ in case, accents or spacing alone."
    )


SOAP_MAX_SIDE = 2048  # a longer side of a matrix gets no basis
OPTIMIZERS = (
    "adamw", "muon", "normuon", "adamuon", "soap", "lion", "galore-lion", "gnprox", "c3o",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    optimizer: str = flag(
        "muon",
        "Optimizer; the muon family, soap and galore-lion take projections, a companion the rest.",
        choices=OPTIMIZERS,
    )
    lr: float = flag(3e-3, "Peak learning rate.", above=0.0)
    adam_lr: float = flag(
        1e-3, "Peak learning rate of what the Muon split leaves to Adam.", above=0.0
    )
    weight_decay: float = flag(
        0.02, "Decoupled weight decay in the first half of the run.", minimum=0.0
    )
    grad_clip: float = flag(1.0, "Global gradient-norm limit.", above=0.0)
    warmup_steps: int = flag(100, "Steps of linear learning-rate warm-up.", minimum=0)
    warmdown_fraction: float = flag(
        0.5, "Final share of the run with a falling learning rate.", minimum=0.0, maximum=1.0
    )
    lr_final_ratio: float = flag(
        0.05, "Learning rate of the last step / peak.", minimum=0.0, maximum=1.0
    )
    muon_strict_split: bool = flag(True, "Send 2-D tensors that are no projections to Adam.")
    muon_exclude_embeddings: bool = flag(True, "Keep embeddings on Adam.")
    muon_exclude_lm_head: bool = flag(True, "Keep the LM head on Adam.")
    muon_max_orthogonalized_dim: int = flag(8192, "Larger dimensions go to Adam.", minimum=1)
    muon_iteration: str = flag(
        "polar-express",
        "Polynomials of muon, normuon and adamuon: one repeated, or the best one per step.",
        choices=("quintic", "polar-express"),
    )
    gn_beta1: float = flag(0.9, "gnprox first-moment decay.", minimum=0.0, below=1.0)
    gn_beta2: float = flag(0.90, "gnprox curvature decay.", minimum=0.0, below=1.0)
    gn_eps: float = flag(1e-8, "gnprox epsilon.", above=0.0)
    gn_damping: float = flag(1e-4, "Initial damping of gnprox.", above=0.0)
    gn_damping_min: float = flag(1e-4, "Lower damping bound.", above=0.0)
    gn_damping_max: float = flag(1.0, "Upper damping bound.", above=0.0)
    gn_damping_up: float = flag(1.08, "Factor on a poor actual/predicted ratio.", minimum=1.0)
    gn_damping_down: float = flag(0.97, "Factor on a good ratio.", above=0.0, maximum=1.0)
    gn_damping_gain: float = flag(
        0.02, "EMA rate of the actual/predicted ratio.", above=0.0, maximum=1.0
    )
    gn_clip_grad: float = flag(0.0, "Element-wise gradient clamp of gnprox; 0 = off.", minimum=0.0)
    gn_ns_steps: int = flag(
        5, "Newton-Schulz steps of muon, normuon and adamuon.", minimum=1, maximum=50
    )
    soap_refresh: int = flag(10, "Steps between turns of soap's eigenbasis.", minimum=1)
    lion_beta1: float = flag(0.9, "Share of the momentum in lion's update.", minimum=0.0, below=1.0)
    lion_beta2: float = flag(0.99, "Decay of lion's momentum.", minimum=0.0, below=1.0)
    lion_state_dtype: str = flag(
        "fp32", "Storage of lion's momentum; bf16 rounds stochastically.", choices=("fp32", "bf16")
    )
    galore_rank: int = flag(
        128, "Dimensions of galore-lion's projected momentum per matrix.", minimum=1
    )
    galore_refresh: int = flag(200, "Steps between projections of galore-lion.", minimum=1)


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    eval_interval: int = flag(
        500, "Steps between evaluations in bits per byte; 0 = only at the end.", minimum=0
    )
    eval_tokens: int = flag(
        65536, "Validation tokens per evaluation; 0 = the whole split.", minimum=0
    )
    sample_interval: int = flag(500, "Steps between sample texts; 0 = only at the end.", minimum=0)
    sample_prompt: str = flag("The ", "Beginning of the sample text.")
    sample_tokens: int = flag(64, "Length of the sample text in tokens.", minimum=1)


@dataclass(slots=True, kw_only=True)
class PrecisionConfig:
    precision: str = flag(
        "auto",
        "Autocast on CUDA; auto = bf16 where supported, else fp16. CPU computes in fp32.",
        choices=("auto", "bf16", "fp16"),
    )
    no_amp: bool = flag(False, "Disable autocast (fp32).")
    kernel_backend: str = flag(
        "torch",
        "Products, scan, attention, loss: torch, or triton (int8 products, 8-bit input gradients).",
        choices=("torch", "triton"),
    )
    mamba_block_t: int = flag(
        0, "Tile of the Triton scan over time; 0 = by device and shape.", minimum=0, maximum=128
    )
    mamba_block_n: int = flag(
        0, "Its tile over state entries; 0 = by device and shape.", minimum=0, maximum=128
    )
    cuda_graphs: str = flag(
        "off",
        "Capture forward and backward of a micro-batch as CUDA graphs and replay them.",
        choices=("off", "on"),
    )
    torch_compile: bool = flag(False, "Compile the model; hand-written gradients stay as they are.")
    torch_compile_backend: str = flag("inductor", "Compiler back end.")
    torch_compile_mode: str = flag("default", "Compiler mode.")
    torch_compile_dynamic: bool = flag(True, "Dynamic shapes.")

    def scan_blocks(self) -> tuple[int, int]:
        """Tile of the Triton scan: steps and state entries, 0 = by device and shape."""
        return self.mamba_block_t, self.mamba_block_n


@dataclass(slots=True, kw_only=True)
class PerfConfig:
    perf_profile_enable: bool = flag(False, "Run a performance window and write perf/*.json.")
    perf_warmup_steps: int = flag(20, "Steps before the window.", minimum=0)
    perf_measure_steps: int = flag(200, "Steps measured.", minimum=1, maximum=10**6)
    perf_profiler_steps: int = flag(
        50, "The last of them run under the operator profiler, not in the averages.", minimum=0
    )
    perf_report_dir: str = flag("", "Report directory; empty = <output-dir>/perf.", is_path=True)
    perf_device_time_mode: str = flag(
        "auto",
        "Clock of operator times; auto = the device's on CUDA, else cpu.",
        choices=("auto", "cuda", "device", "cpu"),
    )
    perf_sync_boundaries: bool = flag(
        True, "Synchronise the device at phase edges inside the window."
    )


@dataclass(slots=True, kw_only=True)
class InstantConfig:
    mode: str = flag(
        "auto",
        "Activation memory: auto = reverse Mamba blocks and compress the others (off with "
        "--torch-compile and --cuda-graphs on); reversible, compress: all blocks; off.",
        choices=("auto", "reversible", "compress", "off"),
    )
    comp_dim: int = flag(
        64, "Rank of the low-rank part of compressed tensors; 0 = none.", minimum=0, maximum=4096
    )
    error_threshold: float = flag(
        0.01, "Relative error above which a compressed tensor takes 8 bits.", minimum=0.0
    )
    reversible_iters: int = flag(
        8, "Cap of the passes that correct an inverse; 2 are exact.", minimum=1, maximum=64
    )
    byte_budget_mb: int = flag(
        0,
        "MiB per micro-batch that compressed blocks may keep, bits by measured sensitivity; "
        "0 = bits by the error threshold.",
        minimum=0,
        maximum=2**20,
    )


@dataclass(slots=True, kw_only=True)
class EmaConfig:
    enabled: bool = flag(False, "Keep an exponential moving average of the weights.")
    decay: float = flag(0.997, "Decay per step.", above=0.0, below=1.0)
    start_fraction: float = flag(
        0.4, "Share of the run after which the average starts.", minimum=0.0, below=1.0
    )


@dataclass(slots=True, kw_only=True)
class CurriculumConfig:
    enabled: bool = flag(False, "Train on shorter rows first, at constant tokens per step.")
    phases: str = flag(
        "0.15,0.40", "Shares of the run at which the row length doubles, ending at seq_len."
    )

    def boundaries(self) -> tuple[float, ...]:
        """The phases as increasing fractions in (0, 1); ConfigError when they are not."""
        try:
            values = tuple(float(item) for item in self.phases.split(","))
        except ValueError:
            values = ()
        inside = all(0.0 < value < 1.0 for value in values)
        if not values or not inside or list(values) != sorted(set(values)):
            raise ConfigError(
                "--curriculum-phases takes increasing fractions between 0 and 1, such as "
                f"0.15,0.40, not {self.phases!r}"
            )
        return values


@dataclass(slots=True, kw_only=True)
class IntegrityConfig:
    integrity_guards_enabled: bool = flag(True, "Write and verify integrity_manifest.json.")
    strict_runtime_audit: bool = flag(
        True, "Refuse missing symbols at start-up and source files that change during the run."
    )
    strict_feature_usage: bool = flag(
        True, "Refuse --steps too small for an enabled feature; fail if one never acted."
    )
    require_unsloth_trl_patch: bool = flag(
        True, "With --grpo-backend trl: refuse to run unless unsloth has patched TRL."
    )
    integrity_hidden_eval_manifest: str = flag(
        "", "Hidden evaluation; empty = training/hidden_eval_manifest.json.", is_path=True
    )
    integrity_hidden_eval_every: int = flag(
        2, "Hidden evaluation every N checkpoint saves; 0 = never.", minimum=0
    )
    integrity_hidden_eval_tasks: int = flag(
        200, "Questions per hidden evaluation.", minimum=200, maximum=10**6
    )


@dataclass(slots=True, kw_only=True)
class GenerateConfig:
    eval_file: str = flag(
        "", "Text that --mode eval measures; none that holds it is trained on.", is_path=True
    )
    hidden: bool = flag(False, "Let --mode eval answer the hidden evaluation instead of a text.")
    prompt: str = flag("", "Text that --mode generate continues and chat begins with.")
    max_new_tokens: int = flag(
        128, "Most tokens that --mode generate writes, and chat at a turn.", minimum=1
    )
    temperature: float = flag(
        0.8, "Sampling temperature, also of sample texts; 0 = greedy.", minimum=0.0
    )
    top_k: int = flag(40, "Sample among the k likeliest tokens; 0 = all.", minimum=0)
    weights: str = flag(
        "last",
        "Weights that eval, generate, chat and export use: the last, their average, or the last "
        "with the adapter that Hydra merged.",
        choices=("last", "ema", "hydra"),
    )
