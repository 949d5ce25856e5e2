"""Wiring of `--grpo-backend trl`: unsloth's patch first, then TRL over the learner's parts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model.sigma_llm import SigmaLLM
from training.config.sigma_config import SigmaConfig
from training.rl.learner import Learner
from training.rl.tasks import CODE_FAMILIES, draw_task
from training.rl.trl_backend import TrlSettings
from training.rl.trl_classes import trl_classes
from training.rl.trl_learner import TrlLearner
from training.rl.trl_sigma import SigmaTrlBackend
from training.rl.unsloth_bridge import load_unsloth
from training.rl.verifier import Verifier
from training.runtime.environment import autocast_dtype
from training.tokenizer import Tokenizer

UNSLOTH_DIRECTORY = Path(".runtime_cache") / "unsloth"


def with_trl(
    config: SigmaConfig,
    learner: Learner,
    model: SigmaLLM,
    tokenizer: Tokenizer,
    *,
    build_verifier: Callable[..., Verifier],
) -> TrlLearner:
    """`learner` with one GRPO step through TRL for each of its ticks, judged by a verifier of its
    own, whose programs have the time that the flags of GRPO give them.

    RuntimeError if TRL is missing, if unsloth's patch is required and not active, or if the reward
    of a solved and of an empty task are not what the flags say.
    """
    device = model.embed.weight.device
    patch = load_unsloth(
        required=config.integrity.require_unsloth_trl_patch,
        cuda=torch.cuda.is_available(),
        cache_directory=UNSLOTH_DIRECTORY,
    )
    trl_classes()
    families = learner.sampler.families
    verifier = build_verifier(config, timeout_ms=round(config.grpo.code_timeout_sec * 1000))
    backend = SigmaTrlBackend(
        model,
        tokenizer,
        optimizer=learner.update.optimizer,
        verify=verifier.verify,
        settings=trl_settings(config, bf16=autocast_dtype(config, device) is torch.bfloat16),
        output_dir=Path(config.run.output_dir) / "trl",
    )
    family = next((name for name in families if name in CODE_FAMILIES), families[0])
    backend.check_reward(draw_task(family, level=1, rng=random.Random(config.run.seed)))
    return TrlLearner(
        learner,
        backend,
        num_tasks=config.ttrl.tasks,
        optimizer=learner.update.optimizer,
        lr=config.sigma_rl.sigma_rl_lr,
        verifier=verifier,
        facts=patch.metrics(),
    )


def trl_settings(config: SigmaConfig, *, bf16: bool) -> TrlSettings:
    grpo, ttrl, own = config.grpo, config.ttrl, config.sigma_rl
    values: dict[str, Any] = dict(
        num_generations=grpo.num_generations,
        prompts_per_update=ttrl.tasks,
        max_new_tokens=ttrl.max_new_tokens,
        temperature=ttrl.temperature,
        top_k=ttrl.top_k,
        reward_success=grpo.reward_success,
        reward_fail=grpo.reward_fail,
        clip_eps=own.sigma_rl_clip_eps,
        kl_weight=own.sigma_rl_kl_weight,
        normalise=not own.no_sigma_rl_adv_norm,
        bf16=bf16,
    )
    return TrlSettings(**values)
