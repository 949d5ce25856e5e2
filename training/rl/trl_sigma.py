"""The TRL back end over a SigmaLLM in training: its weights, its tokenizer, its mode.

Weights are shared, not copied (model/hf_policy.py). Every prompt opens with the end-of-text token,
as every document in training does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.sigma_llm import SigmaLLM
from training.rl.trl_backend import Sample, TrlBackend, TrlSettings, Verify
from training.rl.trl_classes import trl_classes
from training.tokenizer import END_OF_TEXT, Tokenizer


class SigmaTrlBackend:
    """GRPO updates of a SigmaLLM by TRL; `update` is one optimizer step.

    stop_id: the token that ends a completion, by default the end of text. RuntimeError if TRL
    cannot be used.
    """

    def __init__(
        self,
        model: SigmaLLM,
        tokenizer: Tokenizer,
        *,
        optimizer: torch.optim.Optimizer,
        verify: Verify,
        settings: TrlSettings,
        output_dir: Path,
        stop_id: int | None = None,
    ) -> None:
        trl_classes()  # before transformers is imported: its absence has the same message
        self._model = model
        self._stop_id = tokenizer.end_id if stop_id is None else stop_id
        self._end_id = tokenizer.end_id
        self._tokenizer = tokenizer
        self._reference: SigmaLLM | None = None
        was_training = model.training
        try:
            self._backend = TrlBackend(
                self._policy(model),
                transformers_tokenizer(tokenizer, stop_id=self._stop_id),
                optimizer=optimizer,
                verify=verify,
                settings=settings,
                output_dir=output_dir,
                prompt_of=lambda task: END_OF_TEXT + task.prompt,
                read=self._read,
            )
        finally:
            model.train(was_training)

    @property
    def steps_taken(self) -> int:
        """Updates that moved the weights."""
        return self._backend.steps_taken

    @property
    def samples(self) -> list[Sample]:
        """What the last update judged."""
        return self._backend.samples

    def update(
        self, tasks: Sequence[Any], *, seed: int, reference: SigmaLLM | None = None
    ) -> dict[str, float]:
        """One optimizer step on `prompts_per_update` tasks; returns its metrics.

        reference: the model that the KL term measures from; needed when kl_weight is positive. The
        model gets its mode back; gradients are cleared.
        """
        was_training = self._model.training
        if reference is not None and reference is not self._reference:
            self._reference = reference
            self._backend.use_reference(self._policy(reference))
        self._model.eval()
        try:
            return self._backend.update(tasks, seed=seed)
        finally:
            self._model.train(was_training)

    def check_reward(self, task: Any) -> None:
        self._backend.check_reward(task)

    def state_dict(self) -> dict[str, Any]:
        return self._backend.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._backend.load_state_dict(state)

    def _policy(self, model: SigmaLLM) -> Any:
        from model.hf_policy import SigmaPolicy

        return SigmaPolicy.sharing(
            model,
            bos_token_id=self._end_id,
            eos_token_id=self._stop_id,
            pad_token_id=self._end_id,
        )

    def _read(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]
    ) -> list[str]:
        del completions  # TRL's decoder would put replacement characters in other places
        ends = {self._end_id, self._stop_id}
        return [
            self._tokenizer.decode(token for token in ids if token not in ends)
            for ids in completion_ids
        ]


def transformers_tokenizer(tokenizer: Tokenizer, *, stop_id: int) -> Any:
    """The same tokens as a tokenizer of transformers; `stop_id` ends what it generates."""
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    # The characters of the end-of-text token are that token here, which is how prompts begin.
    fast = FastTokenizer.from_str(tokenizer.to_json())
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=END_OF_TEXT,
        eos_token=fast.id_to_token(stop_id),
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
