"""Wiring of replay: the buffer with its reference solutions, and the coins (see build.py)."""

from __future__ import annotations

from training.config.sigma_config import SigmaConfig
from training.replay.buffer import ReplayBuffer, reference_items
from training.replay.causal_replay import CausalReplay, ReplaySettings
from training.replay.priority import PriorityWeights
from training.rl.tasks import TaskSampler
from training.tokenizer import Tokenizer


def build_replay(config: SigmaConfig, tokenizer: Tokenizer) -> CausalReplay | None:
    """What replays in this run; None where nothing does."""
    if not config.replays():
        return None
    own = config.replay
    settings = ReplaySettings(
        propensity=own.causal_replay_propensity,
        alpha=own.causal_replay_alpha,
        beta=own.causal_replay_ema_beta,
        weights=PriorityWeights(
            verifier=own.causal_replay_verifier_weight,
            quality=own.causal_replay_quality_weight,
            novelty=own.causal_replay_novelty_weight,
        ),
        horizon=own.causal_replay_horizon_steps,
        decay=own.causal_replay_horizon_decay,
        least_confidence=config.ttrl.confidence_replay_min,
        is_shuffled=own.causal_replay_shuffled,
    )
    return CausalReplay(settings, build_buffer(config, tokenizer))


def build_buffer(config: SigmaConfig, tokenizer: Tokenizer) -> ReplayBuffer:
    """A buffer with reference solutions of training tasks."""
    buffer = ReplayBuffer(capacity=config.replay.replay_capacity)
    # Other tasks than those that RL, whose seed is the run's, begins with.
    sampler = TaskSampler(config.task_families(), seed=-1 - config.run.seed)
    for item in reference_items(sampler, tokenizer):
        buffer.admit(item)
    return buffer
