"""C3O from its settings: the parts that propose, and the control over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.bitlinear import ternary_weight
from model.sigma_llm import SigmaLLM
from training.config.c3o_sections import C3OConfig
from training.config.sections import SOAP_MAX_SIDE, OptimConfig
from training.credit import CreditSettings
from training.optim.base import ScaledOptimizer
from training.optim.c3o import C3O, C3OSettings
from training.optim.c3o_bases import C3OAdam, C3OAdamW, C3OMuon, C3OPart, C3OSoap

Groups = list[dict[str, Any]]


def build_main(groups: Groups, optim: OptimConfig, c3o: C3OConfig, *, seed: int) -> C3OPart:
    """The base of `--c3o-base`, for the parameters that the split gives it."""
    part: C3OPart
    if c3o.base == "muon":
        part = C3OMuon(
            groups, lr=optim.lr, num_steps=optim.gn_ns_steps, iteration=optim.muon_iteration
        )
    elif c3o.base == "soap":
        part = C3OSoap(groups, lr=optim.lr, refresh=optim.soap_refresh, max_side=SOAP_MAX_SIDE)
    else:
        betas = (c3o.beta1, c3o.beta2)
        part = C3OAdam(groups, lr=optim.lr, betas=betas, eps=c3o.eps, damping=c3o.damping)
    return _configured(part, c3o, seed=2 * seed)


def build_companion(
    groups: Groups, optim: OptimConfig, c3o: C3OConfig, *, betas: tuple[float, float], seed: int
) -> C3OPart:
    """AdamW for the rest."""
    return _configured(C3OAdamW(groups, lr=optim.adam_lr, betas=betas), c3o, seed=2 * seed + 1)


def build_control(
    parts: list[ScaledOptimizer], model: nn.Module, c3o: C3OConfig, *, seed: int
) -> C3O:
    """Trust region and credit over the parts; the model says which weights it rounds."""
    own = [part for part in parts if isinstance(part, C3OPart)]
    names = {
        param: name
        for part in own
        for group in part.param_groups
        for param, name in zip(group["params"], group["param_names"])
    }
    settings = C3OSettings(
        block_size=c3o.block_size,
        trust_radius=c3o.trust_radius,
        trust_norm_refresh_steps=c3o.trust_norm_refresh_steps,
        trust_norm_refresh_drift=c3o.trust_norm_refresh_drift,
        credit=_credit_settings(c3o) if c3o.credit_enabled else None,
        estimator=c3o.credit_estimator,
        draws=c3o.credit_draws,
        is_shuffled=c3o.credit_shuffled,
        seed=seed,
    )
    return C3O(own, settings=settings, names=names, roundings=roundings_of(model))


def roundings_of(model: nn.Module) -> dict[Tensor, Callable[[Tensor], Tensor]]:
    """Of every ternary weight, the function from the latent to the rounded weight."""
    if not isinstance(model, SigmaLLM):
        return {}
    return {
        weight: partial(ternary_weight, group_size=group)
        for weight, group in model.ternary_weights().values()
    }


def _configured(part: C3OPart, c3o: C3OConfig, *, seed: int) -> C3OPart:
    on_cuda = any(param.is_cuda for group in part.param_groups for param in group["params"])
    packs = c3o.state_dtype == "bf16" or (c3o.state_dtype == "auto" and on_cuda)
    part.state_dtype = torch.bfloat16 if packs else torch.float32
    part.grad_clip = c3o.grad_clip
    part.foreach = c3o.foreach_fused
    part.seed = seed
    return part


def _credit_settings(c3o: C3OConfig) -> CreditSettings:
    return CreditSettings(
        ema=c3o.credit_ema,
        gain=c3o.credit_gain,
        clip_value=c3o.credit_clip_value,
        skip_threshold=c3o.credit_skip_threshold,
        scale_min=c3o.block_scale_min,
        scale_max=c3o.block_scale_max,
    )
