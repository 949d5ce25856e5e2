"""The composition root: turns a configuration into a trainer. Wiring only.

Reading order is the order of the run: tokenizer, stream, model, optimizer, services, features,
trainer. What only reads a checkpoint begins at `build_inference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.engram import merge_canonical_ids
from model.generation import generate
from model.opaque import compile_model
from model.sigma_llm import SigmaLLM
from training.build_data import build_corpus, build_stream, build_tokenizer
from training.build_guards import build_guards, open_record
from training.build_hydra import build_hydra
from training.build_replay import build_replay
from training.build_rl import build_rl
from training.build_trials import build_trials
from training.config.hydra_sections import HydraConfig
from training.config.sigma_config import SigmaConfig
from training.data import TokenCorpus, validation_batches
from training.evaluation import EvalResult, evaluate_bpb
from training.features import FEATURES
from training.features.base import Feature, FeatureSet
from training.instant import apply_instant
from training.integrity_guards import check_steps
from training.micro_batch import MicroBatchPlan
from training.micro_pass import EagerPass, MicroPass
from training.optimizer import OptimizerSet, state_settings
from training.optimizer import build_optimizer as optimizer_for
from training.probe import Probe, hold_out, probe_batches
from training.run_policy import LR, REPLAY_BIAS, TTRL_BUDGET, TTRL_INTERVAL, Knob, RunPolicy
from training.run_services import RunServices
from training.runtime.checkpoint import CheckpointStore
from training.runtime.clock import PhaseClock
from training.runtime.directories import perf_directory
from training.runtime.environment import (
    autocast_dtype,
    config_hash,
    configure_threads,
    keep_freed_memory,
    require_cuda_graphs,
    require_kernel_backend,
    resolve_device,
    seed_everything,
    versions,
)
from training.runtime.memory_guard import MemoryGuard, read_memory
from training.runtime.operator_profile import times_on_device
from training.runtime.perf_window import PerfWindow
from training.runtime.recorder import RunRecorder
from training.runtime.report_html import write_report
from training.runtime.report_refresh import ReportRefresher
from training.runtime.save_schedule import SaveSchedule
from training.runtime.spill import watch_for_spill
from training.runtime.startup_audit import check_symbols
from training.runtime.ui import RunDisplay
from training.runtime.watchdog import HangWatchdog
from training.sigma_trainer import SigmaTrainer
from training.sources.embedded import reference_bits_per_byte
from training.spare_memory import within_memory
from training.step_graph import CudaGraphs, StepGraph
from training.stream.batch import BatchStream, closed_on_error
from training.stream.open_stream import deciding_flags
from training.tokenizer import Tokenizer

EVAL_BATCH_TOKENS = 8192


def build_autocast(
    config: SigmaConfig, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward: a null context where the run computes in fp32."""
    dtype = autocast_dtype(config, device)
    if dtype is None:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def build_probe(
    config: SigmaConfig, corpus: TokenCorpus, device: torch.device
) -> tuple[TokenCorpus, Probe | None]:
    """What is left of the corpus to train on, and the probe, where something decides by one."""
    if config.probe_flag() is None:
        return corpus, None
    own, seq_len = config.probe, config.data.seq_len
    rest, held_out = hold_out(corpus, num_tokens=own.batch_size * own.batches * seq_len)
    batches = probe_batches(
        held_out, corpus, batch_size=own.batch_size, num_batches=own.batches, seq_len=seq_len
    )
    return rest, Probe(batches, device=device, autocast=build_autocast(config, device))


def build_policy(config: SigmaConfig) -> RunPolicy:
    """What this run's controllers can turn."""
    rule, interval = config.self_evolve, config.ttrl.interval
    knobs = {LR: Knob(lowest=rule.lr_min_factor, highest=rule.lr_max_factor)}
    if interval:
        knobs[TTRL_INTERVAL] = Knob(
            lowest=min(1.0, rule.ttrl_interval_min / interval),
            highest=max(1.0, rule.ttrl_interval_max / interval),
        )
        # The learner holds the budget itself within its bounds.
        knobs[TTRL_BUDGET] = Knob(lowest=0.25, highest=4.0)
        if config.replays():
            knobs[REPLAY_BIAS] = Knob(lowest=0.5, highest=2.0)
    return RunPolicy(knobs)


def build_model(config: SigmaConfig, tokenizer: Tokenizer, device: torch.device) -> SigmaLLM:
    """Initial weights of --seed on the device; INSTANT is applied but keeps everything exactly."""
    model = SigmaLLM(config.model_config(tokenizer.vocab_size), seed=config.run.seed)
    if model.config.engram_canonical:
        merge_canonical_ids(model, tokenizer.pieces())
    own = config.precision
    model.use_kernels(own.kernel_backend, scan_blocks=own.scan_blocks())
    apply_instant(model)  # keeps everything, until the feature says otherwise
    return model.to(device)


def build_optimizer(config: SigmaConfig, model: nn.Module) -> OptimizerSet:
    """Every parameter in exactly one part, by role (training/optimizer.py); nothing is stepped
    yet."""
    return optimizer_for(model, config.optim, seed=config.run.seed, c3o=config.c3o)


def build_evaluator(
    config: SigmaConfig,
    corpus: TokenCorpus,
    device: torch.device,
    *,
    say: Callable[[str], object],
) -> Callable[[nn.Module], dict[str, float | None]]:
    """Loss and bits per byte on the first `--eval-tokens` of the validation split (0 = all of it),
    None each when there was no memory for it."""

    def evaluate(model: nn.Module) -> dict[str, float | None]:
        def measure(rows: int) -> EvalResult:
            batches = validation_batches(
                corpus,
                seq_len=config.data.seq_len,
                batch_size=rows,
                max_tokens=config.eval.eval_tokens or None,
            )
            autocast = build_autocast(config, device)
            return evaluate_bpb(model, batches, device=device, autocast=autocast)

        most = max(1, EVAL_BATCH_TOKENS // config.data.seq_len)
        result = within_memory(measure, rows=most, what="evaluation", say=say)
        known = result is not None
        return {
            "eval_loss": result.loss if known else None,
            "eval_bpb": result.bpb if known else None,
        }

    return evaluate


def build_sampler(
    config: SigmaConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    say: Callable[[str], object],
) -> Callable[[nn.Module], str | None]:
    """Text the model writes after `--sample-prompt`, from its own generator at every call; None
    when there was no memory for it."""
    prompt = [tokenizer.end_id, *tokenizer.encode(config.eval.sample_prompt)]

    def write(model: Any) -> str:
        tokens = generate(
            model,
            torch.tensor([prompt], device=device),
            max_new_tokens=config.eval.sample_tokens,
            temperature=config.generate.temperature,
            top_k=config.generate.top_k,
            generator=torch.Generator(device=device).manual_seed(config.run.seed),
            stop_id=tokenizer.end_id,
        )
        return tokenizer.decode(tokens[0, 1:].tolist())

    return lambda model: within_memory(lambda _: write(model), rows=1, what="sample", say=say)


def build_store(config: SigmaConfig, tokenizer: Tokenizer, corpus: TokenCorpus) -> CheckpointStore:
    return CheckpointStore(
        Path(config.run.checkpoint_dir),
        max_checkpoints=config.run.max_checkpoints,
        fingerprint=resume_fingerprint(config, tokenizer, corpus),
    )


def build_memory_guard(
    config: SigmaConfig,
    plan: MicroBatchPlan,
    stream: BatchStream,
    display: RunDisplay,
    device: torch.device,
) -> MemoryGuard:
    return MemoryGuard(
        soft=config.run.memory_soft_limit,
        hard=config.run.memory_hard_limit,
        read=lambda: read_memory(device),
        say=display.message,
        can_shrink=lambda: plan.can_halve,
        shrink_prefetch=stream.shrink_prefetch,
        spill=watch_for_spill(device, display.message),
    )


def resume_fingerprint(
    config: SigmaConfig, tokenizer: Tokenizer, corpus: TokenCorpus
) -> dict[str, str]:
    """The settings a resumed run must share with the one that saved, by flag name."""
    model = config.model_config(tokenizer.vocab_size).to_dict()
    own = {
        "seed": config.run.seed,
        "seq-len": config.data.seq_len,
        "batch-size": config.data.batch_size,
        "grad-accum-steps": config.data.grad_accum_steps,
        **state_settings(config.optim, config.c3o),
        "tokenizer-name": tokenizer.sha256,
    }
    if config.hydra.enable:  # named where changed, so that older runs go on
        default = HydraConfig()
        for name in ("lora_rank", "lora_alpha"):
            if (value := getattr(config.hydra, name)) != getattr(default, name):
                own[f"hydra-{name}"] = value
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in (model | own).items()}
    return flags | deciding_flags(config) | {"corpus": corpus.fingerprint, "state schema": "2"}


def build_trainer(
    config: SigmaConfig, *, features: tuple[type[Feature], ...] = FEATURES
) -> SigmaTrainer:
    """Everything `fit` needs, wired. Raises ValueError or RuntimeError before anything is written
    if the machine or the settings cannot do what is asked."""
    device = prepare_process(config)
    feature_set = FeatureSet(features, config, seed=config.run.seed)
    if config.integrity.strict_feature_usage:
        check_steps(feature_set.first_steps(), steps=config.run.steps)
    tokenizer = build_tokenizer(config)
    corpus, probe = build_probe(config, build_corpus(config, tokenizer), device)
    store = build_store(config, tokenizer, corpus)
    if not config.run.no_resume:
        store.check_settings()
    model = build_model(config, tokenizer, device)
    display = RunDisplay()
    recorder = build_recorder(config, display, device)
    guards = build_guards(config, device=device, message=recorder.display.message)
    plan = MicroBatchPlan(
        batch_size=config.data.batch_size, accumulation=config.data.grad_accum_steps
    )
    stream = build_stream(config, tokenizer, corpus)
    with closed_on_error(stream):
        clock = build_clock(config, display, device)
        scaler = build_scaler(config, device)
        services = RunServices(
            clock=clock,
            store=store,
            saves=SaveSchedule(store, interval=config.run.save_interval, say=display.message),
            plan=plan,
            memory=build_memory_guard(config, plan, stream, display, device),
            watchdog=build_watchdog(config, display),
            recorder=recorder,
            audit=guards,
            scaler=scaler,
            evaluate=build_evaluator(config, corpus, device, say=display.message),
            sample=build_sampler(config, tokenizer, device, say=display.message),
            on_open=partial(open_record, config, guards),
            report=ReportRefresher(write_report, say=display.message),
            passes=build_passes(config, model, scaler, device),
            start_facts=start_facts(config, model),
            config_hash=config_hash(config),
            policy=build_policy(config),
            probe=probe,
            rl=build_rl(config, model, tokenizer, stream=stream, clock=clock, features=feature_set),
            replay=build_replay(config, tokenizer),
            hydra=build_hydra(config, model, tokenizer, corpus=corpus, stream=stream, clock=clock),
            trials=build_trials(config, probe, say=display.message),
        )
        return SigmaTrainer(
            config,
            model=model,
            optimizer=build_optimizer(config, model),
            stream=stream,
            features=feature_set,
            services=services,
            device=device,
        )


def prepare_process(config: SigmaConfig) -> torch.device:
    """The device of the run; threads, heap and seeds of this process are set for it."""
    if config.integrity.strict_runtime_audit:
        check_symbols()
    device = resolve_device(config)
    require_kernel_backend(config, device)
    require_cuda_graphs(config, device)
    configure_threads()
    keep_freed_memory()
    seed_everything(config.run.seed)
    return device


def build_watchdog(config: SigmaConfig, display: RunDisplay) -> HangWatchdog:
    output_dir, timeout_s = Path(config.run.output_dir), config.run.hang_timeout_sec
    return HangWatchdog(output_dir, timeout_s=timeout_s, say=display.message)


def build_scaler(config: SigmaConfig, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss where training is in fp16; elsewhere it does nothing."""
    half = autocast_dtype(config, device) is torch.float16
    return torch.amp.GradScaler(device.type, enabled=half)


def build_recorder(config: SigmaConfig, display: RunDisplay, device: torch.device) -> RunRecorder:
    data = config.data
    return RunRecorder(
        Path(config.run.output_dir),
        display=display,
        device=device,
        tokens_per_step=data.batch_size * data.seq_len * data.grad_accum_steps,
        ema_beta=config.run.metrics_ema_beta,
        is_synthetic=config.stream.synthetic_data,
    )


def build_clock(config: SigmaConfig, display: RunDisplay, device: torch.device) -> PhaseClock:
    """The clock of a step's phases, watched by a performance window if one is asked for."""
    perf, data = config.perf, config.data
    if not perf.perf_profile_enable:
        return PhaseClock(device)
    window = PerfWindow(
        perf,
        directory=perf_directory(config),
        device=device,
        on_device=times_on_device(perf.perf_device_time_mode, device),
        tokens_per_step=data.batch_size * data.seq_len * data.grad_accum_steps,
        config_hash=config_hash(config),
        say=display.message,
    )
    return PhaseClock(device, window=window)


def build_forward(config: SigmaConfig, model: nn.Module) -> Callable[..., Any]:
    """The model, or its compiled form."""
    precision = config.precision
    if not precision.torch_compile:
        return model
    return compile_model(
        model,
        backend=precision.torch_compile_backend,
        mode=precision.torch_compile_mode,
        dynamic=precision.torch_compile_dynamic,
    )


def build_passes(
    config: SigmaConfig, model: nn.Module, scaler: torch.amp.GradScaler, device: torch.device
) -> MicroPass:
    """Forward and backward of the micro-batches, by graphs if they are asked for."""
    autocast = build_autocast(config, device)
    eager = EagerPass(model=build_forward(config, model), autocast=autocast, scaler=scaler)
    if config.precision.cuda_graphs == "off":
        return eager
    return StepGraph(eager, model=model, graphs=CudaGraphs(device))


def start_facts(config: SigmaConfig, model: SigmaLLM) -> dict[str, Any]:
    """Columns of the start-up row: what was built, of which versions, what to compare it with."""
    counts = model.num_parameters()
    return {
        "torch_initial_seed": torch.initial_seed(),
        "parameters_total": counts["total"],
        "parameters_active": counts["active"],
        "torch_compile_enabled": int(config.precision.torch_compile),
        **{f"reference_bpb_{name}": bpb for name, bpb in reference_bits_per_byte().items()},
        **{f"version_{name}": value for name, value in versions().items()},
    }
