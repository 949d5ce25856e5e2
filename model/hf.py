"""SigmaLLM as a transformers model, for `generate`, trl, peft and lm-eval.

The only module that imports transformers; written against 4.57 and 5.x. The trunk is the same class
that SigmaLLM uses, so weights differ in nothing but the prefix "model.". transformers' attention
caches do not fit (most blocks keep a recurrent state), so the model brings its own cache object
and prepares its own generation inputs.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeCausalLMOutputWithPast

from model.config import SigmaModelConfig
from model.cross_entropy import IGNORED
from model.initialization import initialize
from model.sigma_llm import SigmaLLM, SigmaState, SigmaTrunk

_TIED = {"lm_head.weight": "model.embed.weight"}
_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


class SigmaHFConfig(PretrainedConfig):
    """Every field of SigmaModelConfig as an attribute, plus what transformers expects by name."""

    model_type = "sigma"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "num_experts_per_tok": "moe_top_k",
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs: Any) -> None:
        for name, target in self.attribute_map.items():
            if name in kwargs:
                kwargs[target] = kwargs.pop(name)
        kwargs.pop("layer_types", None)  # follows from the ratios
        tied = kwargs.pop("tie_word_embeddings", None)
        values = {f.name: kwargs.pop(f.name) for f in fields(SigmaModelConfig) if f.name in kwargs}
        if tied is not None:
            values.setdefault("tie_embeddings", tied)
        model = SigmaModelConfig.from_dict(values)
        for name, value in model.to_dict().items():
            setattr(self, name, value)
        self.layer_types = [_LAYER_TYPES[kind] for kind in model.layer_kinds()]
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(tie_word_embeddings=model.tie_embeddings, **kwargs)

    @classmethod
    def from_model_config(cls, config: SigmaModelConfig, **kwargs: Any) -> SigmaHFConfig:
        """The transformers config of a model config; kwargs: token ids and the like."""
        return cls(**config.to_dict(), **kwargs)

    def to_model_config(self) -> SigmaModelConfig:
        """The settings this config carries; ValueError if they contradict each other."""
        return SigmaModelConfig.from_dict(
            {
                f.name: getattr(self, f.name)
                for f in fields(SigmaModelConfig)
                if hasattr(self, f.name)
            }
        )


class SigmaCache:
    """The state of a batch of rows, in the shape in which `generate` handles caches."""

    is_compileable = False

    def __init__(self, state: SigmaState | None = None) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens (padding included) that the state has seen."""
        return 0 if self.state is None else self.state.num_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search continues."""
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget all that was read; the next forward begins at position 0."""
        self.state = None


class SigmaBackbone(SigmaTrunk):
    """The trunk with a forward of its own: newer trainers ask it for hidden values and form
    log-probabilities from these and the head's weight, without ever holding all logits."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SigmaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments as in SigmaForCausalLM.forward; last_hidden_state (B, T, D) after the norm."""
        cache = past_key_values
        if use_cache and cache is None:
            cache = SigmaCache()
        hidden, _ = self.run_cached(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
        )
        values: dict[str, Any] = dict(
            last_hidden_state=hidden, past_key_values=cache if use_cache else None
        )
        return BaseModelOutputWithPast(**values)

    def run_cached(
        self,
        input_ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SigmaCache | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden values and aux losses; the cache, if there is one, is moved on."""
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None:
            raise ValueError("give input_ids or inputs_embeds")
        hidden, aux, state = self.run(
            input_ids,
            inputs_embeds=inputs_embeds,
            state=None if cache is None else cache.state,
            use_cache=cache is not None,
            valid_mask=_valid_tokens(attention_mask, source.shape[1]),
            reset_mask=None if cache and cache.state else _document_starts(position_ids),
        )
        if cache is not None:
            cache.state = state
        return hidden, aux


class SigmaForCausalLM(PreTrainedModel, GenerationMixin):
    """Trunk `model` and head `lm_head`, tied by default."""

    config_class = SigmaHFConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]
    # A list up to 4.57; from 5 on a mapping from the tied tensor to its source.
    _tied_weights_keys: Any = _TIED if int(transformers.__version__[0]) >= 5 else list(_TIED)

    def __init__(self, config: SigmaHFConfig) -> None:
        super().__init__(config)
        model_config = config.to_model_config()
        self.model = SigmaBackbone(model_config)
        self.lm_head = nn.Linear(model_config.d_model, model_config.vocab_size, bias=False)
        if self.lm_head.weight.device.type != "meta":
            # The seed comes from torch's global stream, as for every transformers model.
            initialize(self, model_config, seed=int(torch.randint(2**31, (1,))))
        # From 5 on transformers makes none, and trl 0.24 writes into it.
        self.warnings_issued: dict[str, bool] = getattr(self, "warnings_issued", {})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: __init__ has filled every weight, and `from_pretrained` refuses missing ones."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that lacks weights is an error, not a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(set(info["missing_keys"]))
        if model.config.tie_word_embeddings:
            missing = [key for key in missing if key not in _TIED]
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} weights, first {missing[0]}")
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                # Statistics of training: not saved, and built without values by the loader.
                module.get_buffer(name).zero_()
        return (model, info) if wants_info else model

    @classmethod
    def from_sigma(cls, model: SigmaLLM, **config_kwargs: Any) -> SigmaForCausalLM:
        """A transformers model with a copy of the weights of `model`."""
        result = cls(SigmaHFConfig.from_model_config(model.config, **config_kwargs))
        state = {
            key if key.startswith("lm_head.") else f"model.{key}": value
            for key, value in model.state_dict().items()
        }
        state.setdefault("lm_head.weight", state["model.embed.weight"])
        result.load_state_dict(state)
        result.tie_weights()
        result.train(model.training)
        return result

    def to_sigma(self) -> SigmaLLM:
        """A SigmaLLM with a copy of these weights."""
        result = SigmaLLM(self.config.to_model_config())
        state = {key.removeprefix("model."): value for key, value in self.state_dict().items()}
        if result.lm_head is None:
            del state["lm_head.weight"]
        result.load_state_dict(state)
        return result.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute blocks in backward. Always non-reentrant: blocks return more than tensors."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SigmaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """The transformers forward of a causal model with experts.

        attention_mask (B, past + T): 0 = padding. position_ids (B, T) are read only for documents
        packed in one row: a 0 after the first column starts a new one; positions themselves are
        relative. labels (B, T) are unshifted. In training `aux_loss` has the routers' losses and
        `loss` includes them.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("a Sigma model returns neither attentions nor hidden states")
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = SigmaCache()
        hidden, aux = self.model.run_cached(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden if labels is not None else hidden[:, kept]).float()
        aux_loss = torch.stack(list(aux.values())).sum() if aux else None
        loss = None
        if labels is not None:
            loss = _shifted_loss(logits, labels, num_items_in_batch)
            loss = loss if aux_loss is None else loss + aux_loss
            logits = logits[:, kept]
        values: dict[str, Any] = dict(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
        )
        output = MoeCausalLMOutputWithPast(**values)
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: SigmaCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward: the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }
        if inputs_embeds is not None and seen == 0:
            return inputs | {"inputs_embeds": inputs_embeds}
        # After a prompt of embeddings input_ids holds the new tokens only.
        unseen = max(1, input_ids.shape[1] - seen) if seen else input_ids.shape[1]
        return inputs | {"input_ids": input_ids[:, -unseen:]}

    def _reorder_cache(self, past_key_values: SigmaCache, beam_idx: Tensor) -> SigmaCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values


def _valid_tokens(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """(B, T) bool of the new tokens, or None when none of them is padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("attention_mask must be (batch, length) with 0 for padding")
    valid = attention_mask[:, -length:] != 0
    return None if bool(valid.all()) else valid


def _document_starts(position_ids: Tensor | None) -> Tensor | None:
    if position_ids is None:
        return None
    starts = position_ids == 0
    starts[:, 0] = False
    return starts if bool(starts.any()) else None


def _shifted_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """Mean nats of label t+1 under logits t; num_items_in_batch replaces the count of labels."""
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device)
    total = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum().clamp_min(1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the model type "sigma"."""
    AutoConfig.register("sigma", SigmaHFConfig, exist_ok=True)
    AutoModelForCausalLM.register(SigmaHFConfig, SigmaForCausalLM, exist_ok=True)
