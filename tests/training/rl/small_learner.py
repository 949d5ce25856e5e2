"""A tiny model with a learner, and verifiers that need no knowledge of arithmetic."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from tests.trainable import patched
from training.rl.answers import extract_answer
from training.rl.candidates import CandidateMaker, CandidateSettings
from training.rl.learner import Learner, LearnerSettings
from training.rl.objectives import ClipSettings
from training.rl.policy_update import PolicyUpdate, UpdateSettings
from training.rl.tasks import TaskSampler
from training.rl.verifier import Judgement, Verifier
from training.tokenizer import Tokenizer, train_bpe

TOKENIZER = Tokenizer(train_bpe([], vocab_size=257).encode())
CANDIDATES = CandidateSettings(group_size=4, max_new_tokens=4, temperature=1.0, top_k=0)
UPDATE = UpdateSettings(
    main="cispo", clip=ClipSettings(), lr=1e-2, entropy_weight=0.0, kl_weight=0.0
)


class OddBytes(Verifier):
    """Passes completions whose bytes have an odd sum: of any model, about half of them."""

    def __init__(self, **_) -> None:
        self.judged = 0

    def passes(self, text: str) -> bool:
        return sum(text.encode()) % 2 == 1

    def verify(self, tasks, completions, *, rng):
        self.judged += len(completions)
        return [
            Judgement(
                passed=self.passes(text),
                parsed=True,
                answer=extract_answer(text, task),
                reason="",
                stage="strict",
                elapsed_s=0.0,
            )
            for task, text in zip(tasks, completions, strict=True)
        ]

    def judge(self, tasks, completions, *, rng):
        return self.verify(tasks, completions, rng=rng)

    def record(self, tasks, judgements):
        pass

    def take_metrics(self):
        return {"verifier_pass_rate": 0.5}

    def close(self):
        pass


class AllPass(OddBytes):
    """Every completion passes: no group has any variance."""

    def passes(self, text: str) -> bool:
        return True


class AsciiFirst(OddBytes):
    """Passes what begins with an ASCII sign, which is easy to learn."""

    def passes(self, text: str) -> bool:
        return text[:1].isascii() and bool(text)


def small_model(seed: int = 0) -> SigmaLLM:
    config = SigmaModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        d_model=32,
        n_heads=2,
        n_layers=2,
        mamba_ratio=1,
        attention_ratio=1,
        kv_latent_dim=16,
        rope_dim=8,
        mamba_head_dim=16,
        mamba_d_state=8,
        mamba_chunk_len=16,
        mimo_rank=1,
        d_ff=48,
        n_routed_experts=0,
        quant_mode="none",
    )
    return patched(SigmaLLM(config, seed=seed))


def small_learner(
    model: SigmaLLM | None = None,
    *,
    verifier=None,
    candidates: dict | None = None,
    update: dict | None = None,
    **settings: Any,
) -> Learner:
    """A learner over `model` whose verifier is OddBytes unless given."""
    model = model or small_model()
    values: dict[str, Any] = {"tasks": 4, "eval_every": 0, "budget_max": 1} | settings
    return Learner(
        LearnerSettings(**values),
        maker=CandidateMaker(
            model,
            TOKENIZER,
            verifier or OddBytes(),
            replace(CANDIDATES, **(candidates or {})),
        ),
        update=PolicyUpdate(model, replace(UPDATE, **(update or {}))),
        sampler=TaskSampler(("add", "subtract"), seed=5),
        val_sampler=TaskSampler(("add", "subtract"), split="val", seed=5),
    )


def weights_of(learner: Learner) -> list:
    return [param.detach().clone() for param in learner.update.model.parameters()]


def seeds(count: int) -> list[int]:
    draw = random.Random(3)
    return [draw.getrandbits(40) for _ in range(count)]
