"""Settings of reinforcement learning from verified or voted rewards."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import ConfigError, flag

RL_MODES = ("igrpo", "dispo", "gspo", "cispo")
GRPO_BACKENDS = ("internal", "trl")
LABEL_MODES = ("verifier", "majority")
PLACEBOS = ("none", "permuted", "random")
TASK_FAMILIES = "add,subtract,multiply,expression,function"
SYMBOLIC_ENGINES = ("sympy", "math-verify")


@dataclass(slots=True, kw_only=True)
class TtrlConfig:
    interval: int = flag(0, "Steps between RL ticks; 0 = no RL.", minimum=0, maximum=10**6)
    tasks: int = flag(1, "Tasks per tick, each with a group of its own.", minimum=1, maximum=4096)
    task_families: str = flag(
        TASK_FAMILIES,
        "Kinds of tasks, separated by commas: add, subtract, multiply, symbolic (polynomials), "
        "expression and function (code), gym:NAME (a generator of reasoning-gym).",
    )
    group_size: int = flag(5, "Completions per policy-gradient group.", minimum=2, maximum=4096)
    max_new_tokens: int = flag(24, "Tokens per completion.", minimum=1, maximum=2**16)
    temperature: float = flag(0.8, "Sampling temperature.", above=0.0, maximum=100.0)
    top_k: int = flag(40, "Sample among the k likeliest tokens; 0 = all.", minimum=0)
    label_mode: str = flag(
        "verifier", "What is rewarded: the verifier's verdict, or the majority's answer.",
        choices=LABEL_MODES,
    )  # fmt: skip
    majority_min_share: float = flag(
        0.5, "Share of votes below which the majority abstains.", minimum=0.0, maximum=1.0
    )
    refine_iters: int = flag(3, "Most retries of a failed candidate.", minimum=0, maximum=64)
    retry_temperature_decay: float = flag(
        0.75, "Factor on the temperature per retry.", above=0.0, maximum=1.0
    )
    retry_top_k_decay: float = flag(0.85, "Factor on top-k per retry.", above=0.0, maximum=1.0)
    fast_refine_on_fail: bool = flag(
        True, "Retry failed candidates at once; igrpo drafts from those that then pass."
    )
    budget_min: int = flag(1, "Fewest updates per tick.", minimum=1, maximum=64)
    budget_max: int = flag(4, "Most updates per tick.", minimum=1, maximum=64)
    asym_verify_enabled: bool = flag(False, "Draft a larger pool and verify a part of it.")
    candidate_pool_multiplier: float = flag(
        1.8, "Pool size / group size.", minimum=1.0, maximum=1024.0
    )
    discriminative_topk: int = flag(
        8, "Candidates verified per task: the uniform group, then the best-scored rest.", minimum=1
    )
    confidence_replay_min: float = flag(
        0.20, "Share of a task's votes that replay asks of a completion that passed.",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    discriminative_weight: float = flag(
        0.35, "Weight of the mean log-prob in the score (rest: learned gate).",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip

    def families(self, *, math: bool, code: bool) -> tuple[str, ...]:
        """The named families that are wanted; ConfigError for one that there is not."""
        # torch-free, but not free: the sandbox's modules come with it.
        from training.rl.tasks import CODE_FAMILIES, num_levels

        names = tuple(dict.fromkeys(name.strip() for name in self.task_families.split(",")))
        try:
            for name in names:
                num_levels(name)
        except ValueError as error:
            raise ConfigError(f"--ttrl-task-families: {error}") from error
        return tuple(name for name in names if (code if name in CODE_FAMILIES else math))


@dataclass(slots=True, kw_only=True)
class SigmaRLConfig:
    sigma_rl_mode: str = flag(
        "cispo", "Main objective, the only one without the mix.", choices=RL_MODES
    )
    sigma_rl_lr: float = flag(
        1e-3, "Step size of RL, whose optimizer is its own (AdamW).", above=0.0, maximum=1.0
    )
    sigma_rl_clip_eps: float = flag(0.2, "Half-width of the ratio clip.", above=0.0, below=1.0)
    sigma_rl_gspo_clip_eps: float = flag(
        0.0, "Half-width of gspo's clip; 0 = --sigma-rl-clip-eps.", minimum=0.0, below=1.0
    )
    sigma_rl_dispo_clip: str = flag(
        "0.2,0.4,0.2,0.2", "Down and up widths for correct, then for incorrect completions."
    )
    sigma_rl_entropy_weight: float = flag(0.001, "Entropy bonus.", minimum=0.0)
    sigma_rl_kl_weight: float = flag(0.02, "KL penalty to the reference snapshot.", minimum=0.0)
    sigma_rl_dispo_logit_temp: float = flag(
        1.0, "Logit temperature of DISPO's log-probs.", above=0.0
    )
    no_sigma_rl_adv_norm: bool = flag(False, "Use r - mean instead of (r - mean)/std.")
    sigma_rl_auto_mix_enabled: bool = flag(False, "Bandit over the four objectives.")
    sigma_rl_auto_mix_floor: float = flag(
        0.10, "Least weight of an objective.", minimum=0.0, maximum=0.25
    )
    sigma_rl_placebo: str = flag(
        "none", "Placebo: permute the rewards inside a group, or draw them.", choices=PLACEBOS
    )

    def dispo_clip(self) -> tuple[float, float, float, float]:
        """The four widths; ConfigError when they are not."""
        try:
            values = [float(item) for item in self.sigma_rl_dispo_clip.split(",")]
        except ValueError:
            values = []
        if len(values) != 4 or not all(0.0 <= value <= 10.0 for value in values):
            raise ConfigError(
                "--sigma-rl-dispo-clip takes four widths from 0 to 10, such as 0.2,0.4,0.2,0.2, "
                f"not {self.sigma_rl_dispo_clip!r}"
            )
        if max(values[0], values[2]) > 1.0:
            raise ConfigError("--sigma-rl-dispo-clip: the first and third width must not exceed 1")
        return (values[0], values[1], values[2], values[3])


@dataclass(slots=True, kw_only=True)
class GrpoConfig:
    """All but the backend are read with trl only; its prompts per step are --ttrl-tasks."""

    backend: str = flag(
        "internal",
        "Who trains on code and math prompts: the RL objectives, or TRL's GRPO in their place, one "
        "step per tick.",
        choices=GRPO_BACKENDS,
    )
    num_generations: int = flag(8, "Completions per GRPO prompt.", minimum=2, maximum=4096)
    code_timeout_sec: float = flag(
        4.0, "Limit per verdict of the GRPO reward, in seconds.", minimum=0.01, maximum=600.0
    )
    reward_success: float = flag(2.0, "GRPO reward of a completion that passes.")
    reward_fail: float = flag(-1.0, "GRPO reward of one that fails.")


@dataclass(slots=True, kw_only=True)
class VerifierConfig:
    math_enabled: bool = flag(True, "Include math tasks.")
    code_enabled: bool = flag(True, "Include code tasks.")
    timeout_ms: int = flag(
        2500, "Limit per verdict on a program, in milliseconds.", minimum=10, maximum=600_000
    )
    eval_every: int = flag(1, "RL ticks between measurements of task_val_pass.", minimum=1)
    eval_tasks: int = flag(16, "Tasks per measurement of task_val_pass.", minimum=1, maximum=4096)
    symbolic_engine: str = flag(
        "sympy", "What compares the formulas of symbolic tasks; math-verify must be installed.",
        choices=SYMBOLIC_ENGINES,
    )  # fmt: skip
    cascade_enabled: bool = flag(True, "Verify in stages with measured error rates.")
    refine_top_fraction: float = flag(
        0.5, "Share of the shortlist that is retried.", minimum=0.0, maximum=1.0
    )
    min_refine_candidates: int = flag(2, "Fewest candidates retried.", minimum=0, maximum=4096)


@dataclass(slots=True, kw_only=True)
class StartupConfig:
    meta_ramp_steps: int = flag(
        64, "Steps in which RL comes up to speed; 0 = at once.", minimum=0, maximum=10**6
    )
    ttrl_interval_multiplier: int = flag(
        4, "Factor on --ttrl-interval at the start of the ramp.", minimum=1, maximum=1024
    )
    meta_real_data_buffer_steps: int = flag(
        -1, "Batches of real data before RL, at the latest step 24; -1 = --ttrl-interval.",
        minimum=-1, maximum=10**6,
    )  # fmt: skip
