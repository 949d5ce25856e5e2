"""Record what other libraries' optimizers do to a few small matrices: peers.json.

    pip install lion-pytorch==0.2.5 pytorch-optimizer==4.1.0
    python -m tests.training.optim.record_peers

These packages are no dependencies of the project, so the comparison is kept as numbers. The peers'
Newton-Schulz iteration computes in bf16; ours, in fp32, is put in its place, so that all else is
compared to fp32 accuracy. Their iteration is not the question: singular values are tested.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch

from training.optim.muon import orthogonalize

HERE = Path(__file__).parent
SHAPES = ((12, 8), (6, 10))
SPACED_SHAPES = ((8, 8), (6, 6), (6, 10))
MAX_SIDE = 8  # of a basis: the last shape has one on its left only
STEPS = 12
KEPT = (1, 5, 12)  # after these steps
PACKAGES = ("lion-pytorch", "pytorch-optimizer")


def problem() -> tuple[list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    """Starting parameters, and the gradients of every step."""
    generator = torch.Generator().manual_seed(11)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    grads = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(STEPS)]
    return params, grads


def spaced_problem() -> tuple[list[torch.nn.Parameter], list[list[torch.Tensor]]]:
    """The same for bases of eigenvectors: sides have full rank and singular values a distance.

    A basis of eigenvectors whose values are equal (those of a null space, above all) is anybody's
    choice: another processor's library makes another one, and the steps go other ways.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(shape: tuple[int, int]) -> torch.Tensor:
        left, _, right = torch.linalg.svd(
            torch.randn(shape, generator=generator), full_matrices=False
        )
        return left * torch.linspace(0.5, 2.0, min(shape)) @ right

    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SPACED_SHAPES]
    grads = [[draw(shape) for shape in SPACED_SHAPES] for _ in range(STEPS)]
    return params, grads


def trajectory(make, problem=problem) -> dict[str, list[list[float]]]:
    """Parameters after the kept steps, flattened, of the optimizer that make(params) gives."""
    params, grads = problem()
    optimizer = make(params)
    kept = {}
    for step, step_grads in enumerate(grads, start=1):
        for param, grad in zip(params, step_grads):
            param.grad = grad.clone()
        optimizer.step()
        if step in KEPT:
            kept[str(step)] = [param.detach().flatten().tolist() for param in params]
    return kept


PROBLEMS = {"soap": spaced_problem}


def peers() -> dict:
    from lion_pytorch import Lion
    from pytorch_optimizer import SOAP, AdaMuon, Muon, NorMuon
    from pytorch_optimizer.optimizer.muon import adamuon, base, muon, normuon

    def iterate(update, num_steps=5, **_):
        return orthogonalize(update[None], num_steps=num_steps)[0]

    for module in (adamuon, base, muon, normuon):
        if hasattr(module, "zero_power_via_newton_schulz_5"):
            module.zero_power_via_newton_schulz_5 = iterate
    decay = {"weight_decay": 0.1}
    single = {"foreach": False}
    return {
        "lion": lambda p: Lion(p, lr=0.01, betas=(0.9, 0.99), **decay),
        "muon": lambda p: Muon(
            [{"params": p, "use_muon": True}], lr=0.02, momentum=0.9, **decay, **single
        ),
        "normuon": lambda p: NorMuon(
            [{"params": p, "use_muon": True}], lr=0.02, momentum=0.9, **decay, **single
        ),
        "adamuon": lambda p: AdaMuon(
            [{"params": p, "use_muon": True}], lr=0.02, betas=(0.0, 0.95), **decay, **single
        ),
        "soap": lambda p: SOAP(
            p,
            lr=0.01,
            betas=(0.95, 0.95),
            precondition_frequency=3,
            weight_decay=0.0,
            max_precondition_dim=MAX_SIDE,
        ),
    }


def main() -> None:
    record = {
        "versions": {name: version(name) for name in PACKAGES},
        "trajectories": {
            name: trajectory(make, PROBLEMS.get(name, problem)) for name, make in peers().items()
        },
    }
    (HERE / "peers.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
