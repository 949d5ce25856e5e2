"""Which parameter goes to which optimizer, and the one object the trainer steps.

Roles come from the parameter's name and shape, so the model needs no marks:
`embed`, `head` (untied LM head), `engram` (n-gram tables), `matrix` (2-D and stacked weights) and
`scalar` (norms, biases, gates). Matrices may go to Muon; everything else goes to AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model.bitlinear import BitLinear
from model.moe import Experts
from training.config.sections import OptimConfig
from training.optim.adamw import AdamW
from training.optim.base import Scale, ScaledOptimizer
from training.optim.muon import Muon

ADAM_BETAS = (0.9, 0.95)
ROLES = ("embed", "head", "engram", "matrix", "scalar")


def parameter_role(name: str, param: Tensor) -> str:
    """Role of a parameter, one of ROLES."""
    if "engram" in name and "table" in name:
        return "engram"
    if name.endswith("embed.weight"):
        return "embed"
    if name.endswith("lm_head.weight"):
        return "head"
    return "matrix" if param.dim() >= 2 else "scalar"


def projection_names(model: nn.Module) -> set[str]:
    """Names of the weights that map activations: those of BitLinear layers and of experts."""
    return {
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules()
        if isinstance(module, BitLinear | Experts)
        for name, param in module.named_parameters(recurse=False)
        if param.dim() >= 2
    }


def expert_parameters(model: nn.Module) -> list[Tensor]:
    """Weights stacked by expert along their first dimension."""
    return [
        param
        for module in model.modules()
        if isinstance(module, Experts)
        for param in module.parameters(recurse=False)
    ]


def takes_muon(name: str, param: Tensor, settings: OptimConfig, *, projections: set[str]) -> bool:
    """Whether the split rules of the `--muon-*` flags send this parameter to Muon.

    The strict split takes projections only: convolutions, routers, gates and per-head tables are
    2-D too, but are no maps between activations whose singular values mean something.
    """
    role = parameter_role(name, param)
    if param.dim() < 2 or role == "engram":
        return False
    if role in ("embed", "head"):
        excluded = (
            settings.muon_exclude_embeddings if role == "embed" else settings.muon_exclude_lm_head
        )
        if excluded:
            return False
    elif settings.muon_strict_split and name not in projections:
        return False
    return max(param.shape[-2:]) <= settings.muon_max_orthogonalized_dim


class OptimizerSet:
    """Several optimizers stepped as one, with a state that is keyed by parameter name."""

    def __init__(self, parts: list[ScaledOptimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def parameters(self) -> Iterable[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def set_schedule(self, *, lr_factor: float, decay_factor: float) -> None:
        """Scale every group's peak learning rate and its weight decay for the coming step."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
            group["weight_decay"] = group["base_weight_decay"] * decay_factor

    def set_scales(self, scales: Mapping[Tensor, Scale] | None) -> None:
        """Give each part the scales of its own parameters; None ends all scaling."""
        for part in self.parts:
            own = {id(param) for group in part.param_groups for param in group["params"]}
            mine = {param: scale for param, scale in (scales or {}).items() if id(param) in own}
            part.set_scales(None if scales is None else mine)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Per-parameter state by parameter name; group settings follow from the configuration."""
        state: dict[str, Any] = {}
        for part in self.parts:
            for group in part.param_groups:
                for name, param in zip(group["param_names"], group["params"]):
                    state[name] = dict(part.state[param]) if param in part.state else {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore by name; a parameter without a stored state is a ValueError."""
        for part in self.parts:
            for group in part.param_groups:
                for name, param in zip(group["param_names"], group["params"]):
                    if name not in state:
                        raise ValueError(f"the optimizer state has no entry for {name}")
                    if state[name]:
                        part.state[param] = {
                            key: _restored(value, param) for key, value in state[name].items()
                        }


def _restored(value: Any, param: Tensor) -> Any:
    """Moments live with their parameter; AdamW's step counter stays where torch wants it."""
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device).clone() if value.dim() else value.clone()


def build_optimizer(model: nn.Module, settings: OptimConfig) -> OptimizerSet:
    """Optimizer of `model` under the `--optimizer` family of flags."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    use_muon = settings.optimizer == "muon"
    projections = projection_names(model)
    muon = [
        item for item in named if use_muon and takes_muon(*item, settings, projections=projections)
    ]
    muon_names = {name for name, _ in muon}
    adam = [item for item in named if item[0] not in muon_names]
    parts: list[ScaledOptimizer] = []
    if muon:
        parts.append(
            Muon(
                [_group(muon, lr=settings.lr, weight_decay=settings.weight_decay)],
                lr=settings.lr,
                num_steps=settings.gn_ns_steps,
            )
        )
    adam_lr = settings.adam_lr if use_muon else settings.lr
    groups = _adam_groups(adam, lr=adam_lr, weight_decay=settings.weight_decay)
    if groups:
        fused = all(param.is_cuda for _, param in adam)
        parts.append(AdamW(groups, lr=adam_lr, betas=ADAM_BETAS, fused=fused))
    experts = expert_parameters(model)
    for part in parts:
        own = {id(param) for group in part.param_groups for param in group["params"]}
        part.watch_stacks(param for param in experts if id(param) in own)
    return OptimizerSet(parts)


def _adam_groups(
    named: list[tuple[str, Tensor]], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Only matrices decay: shrinking norms, biases and embeddings buys nothing."""
    decayed = [item for item in named if parameter_role(*item) == "matrix"]
    names = {name for name, _ in decayed}
    rest = [item for item in named if item[0] not in names]
    groups = []
    if decayed:
        groups.append(_group(decayed, lr=lr, weight_decay=weight_decay))
    if rest:
        groups.append(_group(rest, lr=lr, weight_decay=0.0))
    return groups


def _group(named: list[tuple[str, Tensor]], *, lr: float, weight_decay: float) -> dict[str, Any]:
    return {
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": weight_decay,
        "base_weight_decay": weight_decay,
    }
