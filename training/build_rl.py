"""Wiring of reinforcement learning: tasks, verifier, candidates, update, learner (see build.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from model.sigma_llm import SigmaLLM
from training.config.sigma_config import SigmaConfig
from training.features.base import FeatureSet
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.cascade import VerifierCascade
from training.rl.learner import Learner, LearnerSettings
from training.rl.objectives import ClipSettings
from training.rl.policy_update import PolicyUpdate, UpdateSettings
from training.rl.symbolic import SYMPY
from training.rl.tasks import TaskSampler, draw_task
from training.rl.verifier import Verifier
from training.rl_service import RLService
from training.runtime.clock import PhaseClock
from training.runtime.environment import autocast_dtype
from training.stream.batch import BatchStream
from training.tokenizer import Tokenizer


def build_rl(
    config: SigmaConfig,
    model: SigmaLLM,
    tokenizer: Tokenizer,
    *,
    stream: BatchStream,
    clock: PhaseClock,
    features: FeatureSet,
) -> RLService | None:
    """The service of the RL ticks; None with `--ttrl-interval 0`, and then nothing is built.

    RuntimeError when code tasks are asked for and no sandbox can be had, or a package is missing
    that tasks, their engine or TRL need.
    """
    if not config.ttrl.interval:
        return None
    learner: Any = build_learner(config, model, tokenizer)
    if config.grpo.backend == "trl":
        from training.build_grpo import with_trl

        learner = with_trl(config, learner, model, tokenizer, build_verifier=build_verifier)
    return RLService(
        learner=learner,
        real_batches=count_real_batches(config, stream),
        timed=lambda: clock("ttrl"),
        mark=features.mark,
    )


def count_real_batches(config: SigmaConfig, stream: BatchStream) -> Callable[[int], int]:
    """How many of the batches up to a step were of real data."""

    def real_batches(step: int) -> int:
        substitutes = stream.metrics().get("bootstrap_batches_used", 0)
        return step - int(substitutes) // config.data.grad_accum_steps

    return real_batches


def build_learner(config: SigmaConfig, model: SigmaLLM, tokenizer: Tokenizer) -> Learner:
    """The learner of these flags over the model's own weights."""
    ttrl, own, verifier = config.ttrl, config.sigma_rl, config.verifier
    autocast = build_rl_autocast(config, model.embed.weight.device)
    update = PolicyUpdate(
        model,
        UpdateSettings(
            main=own.sigma_rl_mode,
            clip=ClipSettings(
                eps=own.sigma_rl_clip_eps,
                gspo_eps=own.sigma_rl_gspo_clip_eps,
                dispo=own.dispo_clip(),
            ),
            lr=own.sigma_rl_lr,
            entropy_weight=own.sigma_rl_entropy_weight,
            kl_weight=own.sigma_rl_kl_weight,
            dispo_temperature=own.sigma_rl_dispo_logit_temp,
        ),
        autocast=autocast,
    )
    families = config.task_families()
    for family in families:  # what is not installed is said now
        draw_task(family, level=1, rng=random.Random(config.run.seed))
    strict = build_verifier(config, timeout_ms=verifier.timeout_ms)
    maker = CandidateMaker(
        model,
        tokenizer,
        strict,
        candidate_settings(config),
        cascade=VerifierCascade(strict) if config.verifies_in_stages() else None,
        autocast=autocast,
    )
    return Learner(
        LearnerSettings(
            mode=own.sigma_rl_mode,
            tasks=ttrl.tasks,
            normalise=not own.no_sigma_rl_adv_norm,
            budget_min=ttrl.budget_min,
            budget_max=ttrl.budget_max,
            eval_every=verifier.eval_every,
            eval_tasks=verifier.eval_tasks,
            mix_floor=own.sigma_rl_auto_mix_floor if own.sigma_rl_auto_mix_enabled else None,
        ),
        maker=maker,
        update=update,
        sampler=TaskSampler(families, seed=config.run.seed),
        val_sampler=TaskSampler(families, split="val", seed=config.run.seed),
    )


def build_verifier(config: SigmaConfig, *, timeout_ms: int) -> Verifier:
    """Its sandbox is for code tasks only, an engine that may be missing for formulas only."""
    symbolic = "symbolic" in config.task_families()
    return Verifier(
        code=config.has_code_tasks(),
        timeout_ms=timeout_ms,
        engine=config.verifier.symbolic_engine if symbolic else SYMPY,
    )


def candidate_settings(config: SigmaConfig) -> CandidateSettings:
    ttrl, verifier = config.ttrl, config.verifier
    return CandidateSettings(
        group_size=ttrl.group_size,
        max_new_tokens=ttrl.max_new_tokens,
        temperature=ttrl.temperature,
        top_k=ttrl.top_k,
        label_mode=ttrl.label_mode,
        majority_min_share=ttrl.majority_min_share,
        placebo=config.sigma_rl.sigma_rl_placebo,
        asym=ttrl.asym_verify_enabled,
        pool_multiplier=ttrl.candidate_pool_multiplier,
        topk=ttrl.discriminative_topk,
        score_weight=ttrl.discriminative_weight,
        refine_iters=ttrl.refine_iters if ttrl.fast_refine_on_fail else 0,
        temperature_decay=ttrl.retry_temperature_decay,
        top_k_decay=ttrl.retry_top_k_decay,
        refine_fraction=verifier.refine_top_fraction,
        min_refined=verifier.min_refine_candidates,
    )


def build_rl_autocast(
    config: SigmaConfig, device: torch.device
) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where training has it. fp16 would need a loss scale: its policy gradients underflow."""
    if autocast_dtype(config, device) is not torch.bfloat16:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
