"""A SigmaLLM that is being trained, as the policy of a learner that speaks transformers.

Nothing is copied: the policy is made of the model's own modules, so that a learner's update is the
model's update. Its modules stay in eval mode even while the learner calls `train()`: with dropout
and routing noise the log-probabilities that are trained would not be those of the policy that
wrote the completion, and statistics of routing would mix those of two kinds of text.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import nn

from model.hf import SigmaForCausalLM, SigmaHFConfig
from model.sigma_llm import SigmaLLM


class SigmaPolicy(SigmaForCausalLM):
    """The modules of a SigmaLLM under transformers' names."""

    @classmethod
    def sharing(cls, model: SigmaLLM, **config_kwargs: Any) -> SigmaPolicy:
        """A policy over the weights of `model`; config_kwargs: token ids and the like.

        The modules are in eval mode from here on; who goes on training calls `model.train()`.
        """
        config = SigmaHFConfig.from_model_config(model.config, **config_kwargs)
        with torch.device("meta"):
            policy = cls(config)
        policy.model.embed = model.embed
        policy.model.blocks = model.blocks
        policy.model.final_norm = model.final_norm
        policy.lm_head.weight = cast(nn.Parameter, model.head_weight)
        return policy.train(True)

    def train(self, mode: bool = True) -> Self:
        """Set the flag that learners read; the modules below stay in eval mode."""
        for child in self.children():
            child.train(False)
        self.training = mode
        return self
