"""Which parameter goes to which optimizer, and the one object the trainer steps.

Roles come from the parameter's name and shape, so the model needs no marks:
`embed`, `head` (untied LM head), `engram` (n-gram tables), `matrix` (2-D and stacked weights) and
`scalar` (norms, biases, gates). Muon and its variants, SOAP and GaLore-Lion take the matrices that
the split rules give them, and a companion takes the rest; the others take everything. Only matrices
decay, whoever moves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from model.bitlinear import BitLinear
from model.moe import Experts
from training.config.c3o_sections import C3OConfig
from training.config.sections import SOAP_MAX_SIDE, OptimConfig
from training.optim.adamuon import AdaMuon
from training.optim.adamw import AdamW
from training.optim.base import Scale, ScaledOptimizer
from training.optim.c3o import C3O
from training.optim.c3o_build import build_companion, build_control, build_main
from training.optim.galore_lion import GaloreLion
from training.optim.gnprox import Damping, GNProx
from training.optim.lion import STATE_DTYPES, Lion
from training.optim.muon import Muon
from training.optim.normuon import NorMuon
from training.optim.soap import Soap

ADAM_BETAS = (0.9, 0.95)
CONTROL = "c3o"  # its place among the parameters of the state
MUON_KINDS: dict[str, type[Muon]] = {"muon": Muon, "normuon": NorMuon, "adamuon": AdaMuon}
# These leave what the `--muon-*` rules do not give them to a companion.
SPLITTING = (*MUON_KINDS, "soap", "galore-lion")
SPLIT_RULES = (
    "muon_strict_split",
    "muon_exclude_embeddings",
    "muon_exclude_lm_head",
    "muon_max_orthogonalized_dim",
)


def parameter_role(name: str, param: Tensor) -> str:
    """Role of a parameter: embed, head, engram, matrix or scalar."""
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

    def __init__(self, parts: list[ScaledOptimizer], *, control: C3O | None = None) -> None:
        self.parts = parts
        self.control = control

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def parameters(self) -> Iterable[Tensor]:
        """Every parameter that is updated, once, part by part."""
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

    def metrics(self) -> dict[str, float]:
        """The parts' own columns."""
        row = {name: value for part in self.parts for name, value in part.metrics().items()}
        return row if self.control is None else row | self.control.metrics()

    def step(self) -> None:
        """Update every part; parameters without a gradient stay. The schedule is set beforehand."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Sets gradients to None, which gives their memory back."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Per-parameter state by parameter name; group settings follow from the configuration."""
        state: dict[str, Any] = {}
        for part in self.parts:
            for group in part.param_groups:
                for name, param in zip(group["param_names"], group["params"]):
                    state[name] = dict(part.state[param]) if param in part.state else {}
        if self.control is not None:
            state[CONTROL] = self.control.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore by name; a parameter without a stored state is a ValueError."""
        for part in self.parts:
            for group in part.param_groups:
                for name, param in zip(group["param_names"], group["params"]):
                    if name not in state:
                        raise ValueError(f"the optimizer state has no entry for {name}")
                    part.state.pop(param, None)
                    if state[name]:
                        part.state[param] = {
                            key: _restored(value, param) for key, value in state[name].items()
                        }
        if self.control is not None:
            self.control.load_state_dict(state[CONTROL])


def _restored(value: Any, param: Tensor) -> Any:
    """Moments live with their parameter; AdamW's step counter stays where torch wants it."""
    if not isinstance(value, Tensor):
        return value
    return value.to(param.device).clone() if value.dim() else value.clone()


def state_settings(settings: OptimConfig, c3o: C3OConfig | None = None) -> dict[str, object]:
    """What decides the form of the optimizer's state, by flag: a resumed run must share it."""
    found: dict[str, object] = {"optimizer": settings.optimizer}
    if "lion" in settings.optimizer:
        found["lion-state-dtype"] = settings.lion_state_dtype
    if settings.optimizer == "galore-lion":
        found["galore-rank"] = settings.galore_rank
    kind, c3o = settings.optimizer, c3o or C3OConfig()
    if kind == "c3o":
        kind = c3o.base
        for name in ("base", "block_size", "state_dtype"):
            found[f"c3o-{name.replace('_', '-')}"] = getattr(c3o, name)
    if kind in SPLITTING:  # named where changed, so that older runs go on
        default = OptimConfig()
        for rule in SPLIT_RULES:
            if getattr(settings, rule) != getattr(default, rule):
                found[rule.replace("_", "-")] = getattr(settings, rule)
    return found


def build_optimizer(
    model: nn.Module, settings: OptimConfig, *, seed: int = 0, c3o: C3OConfig | None = None
) -> OptimizerSet:
    """Optimizer of `model` under the `--optimizer` family of flags.

    seed: of the stochastic rounding and the randomised projections. c3o: settings of `--optimizer
    c3o`, its defaults if not given. RuntimeError for gnprox where a parameter is not on a CUDA
    device.
    """
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    own = named
    c3o = c3o or C3OConfig()
    kind = c3o.base if settings.optimizer == "c3o" else settings.optimizer
    if kind in SPLITTING:
        projections = projection_names(model)
        own = [item for item in named if takes_muon(*item, settings, projections=projections)]
    names = {name for name, _ in own}
    rest = [item for item in named if item[0] not in names]
    parts: list[ScaledOptimizer] = []
    if own:
        parts.append(_main_part(own, settings, seed=seed, c3o=c3o))
    if rest:
        parts.append(_companion(rest, settings, seed=seed, c3o=c3o))
    experts = expert_parameters(model)
    for part in parts:
        ids = {id(param) for group in part.param_groups for param in group["params"]}
        part.watch_stacks(param for param in experts if id(param) in ids)
    if settings.optimizer == "c3o":
        return OptimizerSet(parts, control=build_control(parts, model, c3o, seed=seed))
    return OptimizerSet(parts)


def _main_part(
    named: list[tuple[str, nn.Parameter]], settings: OptimConfig, *, seed: int, c3o: C3OConfig
) -> ScaledOptimizer:
    kind, lr = settings.optimizer, settings.lr
    groups = _groups(named, lr=lr, weight_decay=settings.weight_decay)
    if kind == "c3o":
        return build_main(groups, settings, c3o, seed=seed)
    if kind in MUON_KINDS:
        return MUON_KINDS[kind](
            groups, lr=lr, num_steps=settings.gn_ns_steps, iteration=settings.muon_iteration
        )
    if kind == "soap":
        return Soap(groups, lr=lr, refresh=settings.soap_refresh, max_side=SOAP_MAX_SIDE)
    if kind == "galore-lion":
        return GaloreLion(
            groups,
            lr=lr,
            rank=settings.galore_rank,
            refresh=settings.galore_refresh,
            **_lion_options(settings, seed=2 * seed),
        )
    if kind == "lion":
        return Lion(groups, lr=lr, **_lion_options(settings, seed=2 * seed))
    if kind == "gnprox":
        return _gnprox(named, groups, settings)
    return _adamw(named, groups, lr=lr)


def _companion(
    named: list[tuple[str, nn.Parameter]], settings: OptimConfig, *, seed: int, c3o: C3OConfig
) -> ScaledOptimizer:
    """What moves the parameters that the main part does not take."""
    lion = settings.optimizer == "galore-lion"
    lr = settings.lr if lion else settings.adam_lr
    groups = _groups(named, lr=lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "c3o":
        return build_companion(groups, settings, c3o, betas=ADAM_BETAS, seed=seed)
    if lion:
        return Lion(groups, lr=lr, **_lion_options(settings, seed=2 * seed + 1))
    return _adamw(named, groups, lr=lr)


def _adamw(
    named: list[tuple[str, nn.Parameter]], groups: list[dict[str, Any]], *, lr: float
) -> AdamW:
    fused = all(param.is_cuda for _, param in named)
    return AdamW(groups, lr=lr, betas=ADAM_BETAS, fused=fused)


def _lion_options(settings: OptimConfig, *, seed: int) -> dict[str, Any]:
    return {
        "betas": (settings.lion_beta1, settings.lion_beta2),
        "state_dtype": STATE_DTYPES[settings.lion_state_dtype],
        "seed": seed,
    }


def _gnprox(
    named: list[tuple[str, nn.Parameter]], groups: list[dict[str, Any]], settings: OptimConfig
) -> GNProx:
    if not all(param.is_cuda for _, param in named):
        raise RuntimeError(
            "--optimizer gnprox needs CUDA: use --device cuda, or --optimizer muon or adamw here"
        )
    return GNProx(
        groups,
        lr=settings.lr,
        betas=(settings.gn_beta1, settings.gn_beta2),
        eps=settings.gn_eps,
        clip_grad=settings.gn_clip_grad,
        damping=Damping(
            initial=settings.gn_damping,
            minimum=settings.gn_damping_min,
            maximum=settings.gn_damping_max,
            up=settings.gn_damping_up,
            down=settings.gn_damping_down,
            gain=settings.gn_damping_gain,
        ),
    )


def _groups(
    named: list[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
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


def _group(
    named: list[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float
) -> dict[str, Any]:
    return {
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
        "lr": lr,
        "peak_lr": lr,
        "weight_decay": weight_decay,
        "base_weight_decay": weight_decay,
    }
