"""One kernel as a launch would specialise it, to compile it for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One specialisation of a kernel as a launch would make it."""

    kernel: Any
    pointers: dict[str, str]
    numbers: tuple[str, ...]
    constants: dict[str, Any]
    reals: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    use: str = ""  # what tells specialisations of one kernel apart

    def compile(self, architecture: int) -> Any:
        """Triton's result for compute capability `architecture`, arguments aligned as usual."""
        names = self.kernel.arg_names
        signature = {name: f"*{kind}" for name, kind in self.pointers.items()}
        signature |= dict.fromkeys(self.numbers, "i32") | dict.fromkeys(self.reals, "fp32")
        signature |= dict.fromkeys(self.constants, "constexpr")
        aligned = [["tt.divisibility", 16]]
        source = ASTSource(
            fn=self.kernel,
            signature={name: signature[name] for name in names},
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): aligned for name in (*self.pointers, *self.numbers)},
        )
        target = GPUTarget("cuda", architecture, 32)
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=target, options=options)
