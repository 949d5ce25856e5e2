"""Initial values of every weight of a SigmaLLM, in one place.

- Embedding (also the tied head), untied head, router: normal, std `init_std`.
- BitLinear matrices and experts: normal, std 1/sqrt(inputs), so that normalised inputs give outputs
  of unit variance.
- Outputs of the attention and feed-forward branches: the same over sqrt(2 n_layers), so that the
  variance of the stream does not grow with depth (GPT-2).
- Output of Mamba: 1/sqrt(inputs); its branch has a learnable scale, initially `mamba_step_scale`.
- Engram tables: normal, std `init_std`; convolution taps 0; gate scale 1.
- Norm gains 1; time steps, decays, rotations and lambda gates as their modules set them.

All numbers come from one generator seeded by the model's seed and are drawn in the order of
`named_modules`, so two models of one configuration and seed are equal to the bit. Ternary layers
need no rule of their own: their least-squares scale makes the rounded matrix act like the latent
one up to the rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.bitlinear import BitLinear
from model.config import SigmaModelConfig
from model.engram import Engram
from model.mamba import Mamba
from model.moe import Experts, MoE


@torch.no_grad()
def initialize(model: nn.Module, config: SigmaModelConfig, *, seed: int) -> None:
    """Fill the weights of `model` by the table above."""
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * config.n_layers) ** -0.5

    def fill(weight: Tensor, std: float) -> None:
        # Drawn on the CPU in fp32, so that the values do not depend on the device.
        values = torch.empty(weight.shape, dtype=torch.float32).normal_(
            std=std, generator=generator
        )
        weight.copy_(values)

    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            ends_branch = name.endswith((".mixer.out_proj", ".ffn.down", ".shared.down"))
            parent = model.get_submodule(name.rpartition(".")[0])
            scaled = ends_branch and not isinstance(parent, Mamba)
            fill(module.weight, module.in_features**-0.5 * (depth_scale if scaled else 1.0))
        elif isinstance(module, Experts):
            fill(module.gate_up, module.gate_up.shape[2] ** -0.5)
            fill(module.down, module.down.shape[2] ** -0.5 * depth_scale)
        elif isinstance(module, MoE):
            fill(module.router.weight, config.init_std)
        elif isinstance(module, Engram):
            fill(module.table, config.init_std)
        elif isinstance(module, nn.Embedding) or (
            isinstance(module, nn.Linear) and name == "lm_head"
        ):
            fill(module.weight, config.init_std)
