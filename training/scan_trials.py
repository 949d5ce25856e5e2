"""The Mamba scan of a model at the shape it trains with, as something whose tile can be tried.

On CPU the tile is the chunk length: quadratic work inside a chunk against passes over states
between chunks. On Triton it is what `--mamba-block-t` and `--mamba-block-n` set. Inputs are drawn
once and pass through the model's own projections; a trial is the scan's forward and backward, many
times, beside training and without effect on it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evolution.kernel_tuner import Arm
from model.mamba import Mamba
from model.ssd import ScanInputs, mamba_scan
from training.runtime.clock import synchronize

REPEATS = 20
TOLERANCE = 1e-4  # of the largest value of each output and gradient
CHUNKS = (16, 32, 64, 128, 256)
TIME_BLOCKS = (16, 32, 64)
MAX_BLOCK = 128


def scan_mixers(model: nn.Module) -> list[Mamba]:
    """The Mamba mixers in the order of the blocks; [] for a model without."""
    return [module for module in model.modules() if isinstance(module, Mamba)]


def use_arm(mixer: Mamba, arm: Arm) -> None:
    """Let the mixer's scan run with the arm: (chunk,) in torch, (t, n) on Triton."""
    if len(arm) == 1:
        mixer.chunk_len = arm[0]
    else:
        mixer.blocks = (arm[0], arm[1])


class ScanTrials:
    """Trials of one mixer's scan over `rows` rows of `length` tokens.

    in_bf16: whether training multiplies in bf16. now: the clock, in seconds.
    """

    def __init__(
        self,
        mixer: Mamba,
        *,
        rows: int,
        length: int,
        in_bf16: bool,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.mixer = mixer
        self.shape = (rows, length)
        self.in_bf16 = in_bf16
        self._now = now
        self._default = (mixer.chunk_len, mixer.blocks)  # before any arm is used
        self._device = mixer.control_proj.weight.device

    @property
    def arms(self) -> list[Arm]:
        """The default first."""
        chunk, blocks = self._default
        if self.mixer.backend != "triton":
            others = [(size,) for size in CHUNKS if size <= self.shape[1] and size != chunk]
            return [(chunk,), *others]
        widest = max(16, min(MAX_BLOCK, self.mixer.d_state))
        pairs = [(t, min(factor * t, widest)) for t in TIME_BLOCKS for factor in (4, 8)]
        return list(dict.fromkeys([blocks, *pairs]))

    @property
    def key(self) -> str:
        """Device, backend, types and shape: what a measured latency is for."""
        mixer, device = self.mixer, self._device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        sizes = (*self.shape, mixer.num_heads, mixer.head_dim, mixer.d_state, mixer.rank)
        dtype = "bf16" if self.in_bf16 else "fp32"
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        return (
            f"{name} {threads} {mixer.backend} {dtype} {'x'.join(map(str, sizes))} {self.arms[0]}"
        )

    @torch.no_grad()
    def draw(self) -> ScanInputs:
        """Inputs of the scan, the same every time, without touching any other random numbers."""
        generator = torch.Generator().manual_seed(0)
        width = self.mixer.in_proj.in_features
        x = torch.randn(*self.shape, width, generator=generator).to(self._device)
        return self.mixer.scan_inputs(x)[0]

    def run(self, inputs: ScanInputs, arm: Arm, **changes: Any) -> dict[str, Tensor]:
        """Outputs of the scan with the arm and all gradients of the sum of their squares."""
        chunk, blocks = (arm[0], (0, 0)) if len(arm) == 1 else (self._default[0], arm)
        given: dict[str, Any] = {
            name: None if value is None else value.detach().requires_grad_()
            for name, value in _named(inputs).items()
        }
        settings = {"backend": self.mixer.backend, "in_bf16": self.in_bf16, "blocks": blocks}
        with torch.enable_grad():
            y, state = mamba_scan(ScanInputs(**given), chunk_len=chunk, **(settings | changes))
            y.square().sum().backward()
        found = {"y": y.detach(), "h": state.h.detach()}
        return found | {name: v.grad for name, v in given.items() if v is not None}

    def error(self, arm: Arm) -> float:
        """Largest distance from the scan in fp64 at the model's chunk length, over each value's
        largest entry. Products are in fp32 here, whatever training uses."""
        inputs = self.draw()
        named = _named(inputs).items()
        wide: dict[str, Any] = {name: None if v is None else v.double() for name, v in named}
        wanted = self.run(ScanInputs(**wide), (self._default[0],), backend="torch", in_bf16=False)
        found = self.run(inputs, arm, in_bf16=False)
        return max(
            float((found[name].double() - value).abs().amax() / value.abs().amax().clamp_min(1e-30))
            for name, value in wanted.items()
        )

    def latency(self, arm: Arm) -> float:
        """Median microseconds of forward and backward with the arm, after one for warming up."""
        inputs = self.draw()
        self.run(inputs, arm)
        times = []
        for _ in range(REPEATS):
            synchronize(self._device)
            start = self._now()
            self.run(inputs, arm)
            synchronize(self._device)
            times.append(self._now() - start)
        return 1e6 * statistics.median(times)


def _named(inputs: ScanInputs) -> dict[str, Tensor | None]:
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
