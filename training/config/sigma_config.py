"""The configuration of a run: all sections, and every rule that needs no machine to check.

What depends on the machine (CUDA, memory, directories) is `training/runtime/environment.py`'s.
"""

# ruff: noqa: RUF009  (`section` returns a dataclass field with a factory, not a shared default)

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from evolution.genome import Genome
from model.config import SigmaModelConfig
from training.config.c3o_sections import C3OConfig, ProbeConfig
from training.config.data_sections import AdaptiveConfig, StreamConfig
from training.config.evolution_sections import PromotionConfig, UroborosConfig
from training.config.fields import ConfigError, iter_flags, section
from training.config.fractal_sections import FractalConfig
from training.config.hydra_sections import HydraConfig, MergeConfig
from training.config.policy_sections import SelfEvolveConfig, SelfImproverConfig
from training.config.replay_sections import ReplayConfig
from training.config.rl_sections import (
    GrpoConfig,
    SigmaRLConfig,
    StartupConfig,
    TtrlConfig,
    VerifierConfig,
)
from training.config.sections import (
    CurriculumConfig,
    DataConfig,
    EmaConfig,
    EvalConfig,
    GenerateConfig,
    InstantConfig,
    IntegrityConfig,
    ModelConfig,
    OptimConfig,
    PerfConfig,
    PrecisionConfig,
    RunConfig,
)
from training.config.ttt_sections import TTTConfig

__all__ = ["ConfigError", "SigmaConfig"]

DEVICE_PATTERN = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


class WrongOptimizerError(ConfigError, RuntimeError):
    """Credit without the optimizer that uses it."""


@dataclass(slots=True, kw_only=True)
class SigmaConfig:
    """Every setting of `train_sigma.py`, by section."""

    run: RunConfig = section(RunConfig, title="Run and device")
    data: DataConfig = section(DataConfig, title="Tokenizer and batch")
    stream: StreamConfig = section(StreamConfig, title="Data stream")
    model: ModelConfig = section(ModelConfig, title="Model")
    optim: OptimConfig = section(OptimConfig, title="Optimizer and schedule")
    c3o: C3OConfig = section(C3OConfig, title="C3O and credit", prefix="c3o")
    probe: ProbeConfig = section(ProbeConfig, title="Probe text", prefix="probe")
    ttrl: TtrlConfig = section(TtrlConfig, title="Reinforcement learning", prefix="ttrl")
    sigma_rl: SigmaRLConfig = section(SigmaRLConfig, title="RL objectives")
    grpo: GrpoConfig = section(GrpoConfig, title="GRPO through TRL", prefix="grpo")
    verifier: VerifierConfig = section(VerifierConfig, title="Verifier", prefix="verifier")
    replay: ReplayConfig = section(ReplayConfig, title="Replay")
    startup: StartupConfig = section(StartupConfig, title="Start-up", prefix="startup")
    self_evolve: SelfEvolveConfig = section(
        SelfEvolveConfig, title="Rule on the learning rate", prefix="self-evolve"
    )
    self_improver: SelfImproverConfig = section(
        SelfImproverConfig, title="Search for the run's policy", prefix="self-improver"
    )
    eval: EvalConfig = section(EvalConfig, title="Evaluation and samples while training")
    precision: PrecisionConfig = section(PrecisionConfig, title="Precision and compilation")
    perf: PerfConfig = section(PerfConfig, title="Performance window")
    instant: InstantConfig = section(InstantConfig, title="INSTANT memory", prefix="instant")
    ema: EmaConfig = section(EmaConfig, title="Weight average", prefix="ema")
    curriculum: CurriculumConfig = section(
        CurriculumConfig, title="Sequence-length curriculum", prefix="curriculum"
    )
    fractal: FractalConfig = section(FractalConfig, title="Fractal NAS", prefix="fractal")
    integrity: IntegrityConfig = section(IntegrityConfig, title="Integrity and audit")
    adaptive: AdaptiveConfig = section(
        AdaptiveConfig, title="Adaptive mixture of sources", prefix="aux"
    )
    uroboros: UroborosConfig = section(
        UroborosConfig, title="Trials of overlays (Uroboros)", prefix="uroboros"
    )
    promotion: PromotionConfig = section(PromotionConfig, title="Promotion and journal")
    hydra: HydraConfig = section(HydraConfig, title="Adapters per domain (Hydra)", prefix="hydra")
    merge: MergeConfig = section(MergeConfig, title="Merge of adapters", prefix="merge")
    generate: GenerateConfig = section(GenerateConfig, title="Evaluating and generating")
    ttt: TTTConfig = section(TTTConfig, title="Test-time training", prefix="ttt")

    def model_config(self, vocab_size: int) -> SigmaModelConfig:
        """Shape of the network for a tokenizer of `vocab_size` tokens."""
        values = {f.name: getattr(self.model, f.name) for f in fields(ModelConfig)}
        base = SigmaModelConfig(vocab_size=vocab_size, **values)
        return Genome.parse(self.fractal.genome).network(base) if self.fractal.genome else base

    def validate(self) -> SigmaConfig:
        """Check every value and every rule between values; ConfigError is one line."""
        for flag in iter_flags(SigmaConfig):
            part = getattr(self, flag.section)
            setattr(part, flag.field, flag.check(getattr(part, flag.field)))
        self._validate_run()
        self._validate_kernels()
        self._validate_graphs()
        self._validate_optim()
        self._validate_credit()
        self._validate_rl()
        self._validate_replay()
        self._validate_policy()
        self._validate_instant()
        self._validate_curriculum()
        self._validate_adaptive()
        self._validate_perf()
        self._validate_search()
        self.hydra.domain_names()
        try:
            self.model_config(vocab_size=SigmaModelConfig().vocab_size).validate()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return self

    def _validate_run(self) -> None:
        run = self.run
        if not DEVICE_PATTERN.fullmatch(run.device):
            raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, not {run.device!r}")
        for name in ("output_dir", "checkpoint_dir"):
            if not getattr(run, name).strip():
                raise ConfigError(f"--{name.replace('_', '-')} must name a directory")
        if not self.data.tokenizer_name.strip():
            raise ConfigError("--tokenizer-name must not be empty; the shipped one is assets")
        if self.generate.hidden and self.generate.eval_file:
            raise ConfigError("--hidden and --eval-file exclude each other: give one of them")

    def _validate_kernels(self) -> None:
        precision = self.precision
        for name in ("mamba_block_t", "mamba_block_n"):
            size, asked = getattr(precision, name), f"--{name.replace('_', '-')}"
            if size and (size < 16 or size & (size - 1)):
                raise ConfigError(f"{asked} must be 16, 32, 64, 128 or 0, not {size}")
            if size and precision.kernel_backend != "triton":
                raise ConfigError(f"{asked} needs --kernel-backend triton; else give {asked} 0")
            if size and self.fractal.interval_steps:
                raise ConfigError(f"--fractal-interval-steps chooses what {asked} fixes: drop one")

    def _validate_graphs(self) -> None:
        """What cannot be captured: steps that differ, and steps that wait for the host."""
        if self.precision.cuda_graphs == "off":
            return
        model, own = self.model, self.precision
        one_scale = model.quant_mode != "none" and not model.bitlinear_group_size
        in_kernels = own.kernel_backend == "triton" and one_scale
        problems = {
            "a step as it is written, which compiling replaces: add --no-torch-compile": (
                own.torch_compile
            ),
            "activations that are kept whole: add --instant-mode off": self.instant_mode() != "off",
            "no loss that only some steps have: add --no-causal-replay-enabled": self.replays(),
            "no search over networks: drop --fractal-arch-search": self.fractal.arch_search,
            "experts only if nothing waits for their loads: add --moe-dispatch-mode grouped "
            "--kernel-backend triton --quant-mode bitnet_1_58 --bitlinear-group-size 0": (
                model.n_routed_experts > 0
                and not (model.moe_dispatch_mode == "grouped" and in_kernels)
            ),
        }
        for problem, is_there in problems.items():
            if is_there:
                raise ConfigError(f"--cuda-graphs on captures {problem}, or give --cuda-graphs off")

    def _validate_optim(self) -> None:
        optim = self.optim
        bounds = (optim.gn_damping_min, optim.gn_damping_max)
        if optim.optimizer == "gnprox" and not bounds[0] <= optim.gn_damping <= bounds[1]:
            raise ConfigError(
                f"--gn-damping {optim.gn_damping:g} must lie between --gn-damping-min "
                f"{bounds[0]:g} and --gn-damping-max {bounds[1]:g}"
            )

    def _validate_credit(self) -> None:
        if self.c3o.credit_enabled and self.optim.optimizer != "c3o":
            raise WrongOptimizerError(
                "c3o credit is enabled but optimizer is not 'c3o'. Use --optimizer c3o or disable "
                "--c3o-credit-enabled."
            )
        flag = self.probe_flag()
        if flag is not None and self.stream.data_backend != "embedded":
            off = "--self-evolve-interval 0" if "interval" in flag else f"--no-{flag[2:]}"
            raise ConfigError(
                f"{flag} needs probe text held out of the training text, which "
                f"--data-backend embedded has; use that, or {off}"
            )

    def probe_flag(self) -> str | None:
        """The flag that asks for probe text, the first of several; None if none does."""
        asking = {
            "--probe-held-out": self.probe.held_out,
            "--c3o-credit-enabled": self.c3o.credit_enabled,
            "--self-improver-enabled": self.self_improver.enabled,
            "--self-evolve-interval": self.self_evolve.interval > 0,
            "--uroboros-enabled": self.uroboros.enabled,
            "--causal-replay-enabled": self.replays(),
        }
        return next((flag for flag, is_on in asking.items() if is_on), None)

    def replays(self) -> bool:
        """Whether completions that passed are replayed."""
        return self.replay.causal_replay_enabled and self.replay.replay_capacity > 0

    def _validate_replay(self) -> None:
        if not self.replays():
            return
        if not self.task_families():
            raise ConfigError(
                "--causal-replay-enabled needs tasks: add --verifier-math-enabled or "
                "--verifier-code-enabled for those of --ttrl-task-families, or give "
                "--no-causal-replay-enabled"
            )
        if self.ttrl.interval and self.ttrl.label_mode == "majority":
            raise ConfigError(
                "--causal-replay-enabled shows right answers, which --ttrl-label-mode majority "
                "goes without; leave one of them out"
            )

    def _validate_policy(self) -> None:
        own, rule = self.self_improver, self.self_evolve
        if rule.ttrl_interval_min > rule.ttrl_interval_max:
            raise ConfigError(
                f"--self-evolve-ttrl-interval-min {rule.ttrl_interval_min} must not exceed "
                f"--self-evolve-ttrl-interval-max {rule.ttrl_interval_max}"
            )
        if not own.sigma_min <= own.mutation_sigma <= own.sigma_max:
            raise ConfigError(
                f"--self-improver-mutation-sigma {own.mutation_sigma:g} must lie between "
                f"--self-improver-sigma-min {own.sigma_min:g} and --self-improver-sigma-max "
                f"{own.sigma_max:g}"
            )

    def _validate_rl(self) -> None:
        ttrl = self.ttrl
        self.sigma_rl.dispo_clip()
        if self.grpo.reward_fail >= self.grpo.reward_success:
            raise ConfigError(
                f"--grpo-reward-fail {self.grpo.reward_fail:g} must be below "
                f"--grpo-reward-success {self.grpo.reward_success:g}"
            )
        if ttrl.budget_min > ttrl.budget_max:
            raise ConfigError(
                f"--ttrl-budget-min {ttrl.budget_min} must not exceed --ttrl-budget-max "
                f"{ttrl.budget_max}"
            )
        if not ttrl.interval:
            if ttrl.task_families != TtrlConfig().task_families:
                self.task_families()
            return
        self._validate_trl()
        if not self.task_families():
            raise ConfigError(
                "--ttrl-interval needs tasks: add --verifier-math-enabled or "
                "--verifier-code-enabled for those of --ttrl-task-families, or give "
                "--ttrl-interval 0"
            )
        if ttrl.label_mode == "majority" and self.has_code_tasks():
            raise ConfigError(
                "--ttrl-label-mode majority counts answers, which programs have none of: add "
                "--no-verifier-code-enabled"
            )
        if ttrl.asym_verify_enabled and ttrl.discriminative_topk < ttrl.group_size:
            raise ConfigError(
                f"--ttrl-discriminative-topk {ttrl.discriminative_topk} must be at least "
                f"--ttrl-group-size {ttrl.group_size}"
            )

    def _validate_trl(self) -> None:
        """What belongs to the ticks that TRL's step takes the place of."""
        if self.grpo.backend != "trl":
            return
        own = self.sigma_rl
        refused = {
            "--ttrl-label-mode majority": self.ttrl.label_mode == "majority",
            "--ttrl-asym-verify-enabled": self.ttrl.asym_verify_enabled,
            "--sigma-rl-auto-mix-enabled": own.sigma_rl_auto_mix_enabled,
            f"--sigma-rl-placebo {own.sigma_rl_placebo}": own.sigma_rl_placebo != "none",
        }
        if names := [name for name, is_given in refused.items() if is_given]:
            raise ConfigError(
                "--grpo-backend trl has an objective and groups of its own, on verified rewards: "
                f"drop {', '.join(names)}"
            )

    def verifies_in_stages(self) -> bool:
        """Whether the cascade judges; TRL's completions come without what its gate reads."""
        return self.verifier.cascade_enabled and self.grpo.backend != "trl"

    def task_families(self) -> tuple[str, ...]:
        """Families that RL draws tasks of."""
        own = self.verifier
        return self.ttrl.families(math=own.math_enabled, code=own.code_enabled)

    def has_code_tasks(self) -> bool:
        """Whether RL runs programs, for which a sandbox is needed."""
        return bool(self.ttrl.families(math=False, code=self.verifier.code_enabled))

    def instant_mode(self) -> str:
        """`--instant-mode` as it will be: auto is off where something else plans the memory."""
        mode, precision = self.instant.mode, self.precision
        planned = precision.torch_compile or precision.cuda_graphs == "on"
        return "off" if mode == "auto" and planned else mode

    def _validate_instant(self) -> None:
        mode = self.instant.mode
        if mode in ("reversible", "compress") and self.precision.torch_compile:
            raise ConfigError(
                f"--instant-mode {mode} and --torch-compile exclude each other: add "
                "--no-torch-compile"
            )
        if mode == "reversible" and self.model.residual_layout != "two-stream":
            raise ConfigError("--instant-mode reversible needs --residual-layout two-stream")
        if mode == "reversible" and self.instant.byte_budget_mb:
            raise ConfigError(
                "--instant-byte-budget-mb is for compressed blocks: use --instant-mode compress"
            )

    def _validate_curriculum(self) -> None:
        if not self.curriculum.enabled:
            return
        boundaries, seq_len = self.curriculum.boundaries(), self.data.seq_len
        divisor = 2 ** len(boundaries)
        if seq_len % divisor or seq_len // divisor < 2:
            raise ConfigError(
                f"--curriculum-phases with {len(boundaries)} values cut rows to seq_len/{divisor}: "
                f"--seq-len must be a multiple of {divisor} of at least {2 * divisor}, "
                f"not {seq_len}"
            )

    def _validate_adaptive(self) -> None:
        adaptive = self.adaptive
        if adaptive.adaptive_min_weight > adaptive.adaptive_max_weight:
            raise ConfigError(
                f"--aux-adaptive-min-weight {adaptive.adaptive_min_weight:g} must not exceed "
                f"--aux-adaptive-max-weight {adaptive.adaptive_max_weight:g}"
            )
        if not adaptive.enable_adaptive_sources:
            return
        if adaptive.adaptive_signal == "excess" and not adaptive.adaptive_reference:
            raise ConfigError(
                "--aux-adaptive-signal excess needs --aux-adaptive-reference, the checkpoint "
                "directory of a trained reference model"
            )

    def _validate_perf(self) -> None:
        perf, steps = self.perf, self.run.steps
        if not perf.perf_profile_enable:
            return
        if perf.perf_profiler_steps >= perf.perf_measure_steps:
            raise ConfigError(
                f"--perf-profiler-steps {perf.perf_profiler_steps} must be below "
                f"--perf-measure-steps {perf.perf_measure_steps}: profiled steps are not averaged"
            )
        needed = perf.perf_warmup_steps + perf.perf_measure_steps
        if needed > steps:
            raise ConfigError(
                f"--perf-warmup-steps + --perf-measure-steps = {needed} must not exceed --steps "
                f"{steps}"
            )

    def _validate_search(self) -> None:
        if not self.fractal.arch_search:
            return
        if self.fractal.genome:
            raise ConfigError(
                "--fractal-arch-search looks for a network and --fractal-genome gives one: leave "
                "one of them out"
            )
        if self.stream.data_backend != "embedded":
            raise ConfigError(
                "--fractal-arch-search needs probe text held out of the training text, which "
                "--data-backend embedded has; use that"
            )
        if self.optim.optimizer == "c3o":
            raise ConfigError(
                "--fractal-arch-search cannot carry the credit of --optimizer c3o from network to "
                "network: use --optimizer muon"
            )
        if self.precision.torch_compile:
            raise ConfigError(
                "--fractal-arch-search builds a network per trial, too many to compile: add "
                "--no-torch-compile"
            )
