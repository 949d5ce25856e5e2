"""Compile every Triton kernel ahead of time for every GPU generation, without a GPU.

    python scripts/compile_kernels.py            a table
    python scripts/compile_kernels.py --json     one JSON object a line

Shown for each kernel and architecture: the tensor-core instructions in its PTX, bytes of shared
memory, bytes of machine code. Registers, spills and speed need a device. The interpreter must be
off (TRITON_INTERPRET unset), for it replaces the compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TENSOR_CORE = re.compile(r"(?:wgmma\.mma_async|tcgen05\.mma|(?<![\w.])mma)[a-z0-9._:]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One specialisation of a kernel as a launch would make it."""

    kernel: Any
    pointers: dict[str, str]
    numbers: tuple[str, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def compile(self, architecture: int) -> Any:
        """Triton's result for compute capability `architecture`, arguments aligned as usual."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        signature = {name: f"*{kind}" for name, kind in self.pointers.items()}
        signature |= dict.fromkeys(self.numbers, "i32") | dict.fromkeys(self.constants, "constexpr")
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


def builds(architecture: int) -> list[Build]:
    """All kernels with the launch settings that their launchers choose on this architecture."""
    from model import triton_kernels as kernels
    from model.ternary_linear import gradient_tiles, product_tiles

    product, gradient = product_tiles(16384, architecture), gradient_tiles(architecture)
    return [
        Build(
            kernel=kernels.quantize_rows_kernel,
            pointers={
                **{"x_ptr": "bf16", "column_scale_ptr": "fp32"},
                **{"codes_ptr": "i8", "scale_ptr": "fp32"},
            },
            numbers=("num_columns", "x_stride"),
            constants={"HAS_COLUMN_SCALE": True, "BLOCK": 1024},
        ),
        Build(
            kernel=kernels.ternarize_kernel,
            pointers={
                **{"weight_ptr": "fp32", "codes_ptr": "i8"},
                **{"codes_t_ptr": "i8", "scale_ptr": "fp32"},
            },
            numbers=("num_rows", "num_columns", "weight_stride"),
            constants={"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256},
        ),
        Build(
            kernel=kernels.int8_product_kernel,
            pointers={
                **{"a_ptr": "i8", "b_ptr": "i8", "out_ptr": "bf16"},
                **{"a_scale_ptr": "fp32", "b_scale_ptr": "fp32"},
            },
            numbers=("num_rows", "num_outputs", "depth", "out_stride"),
            constants={
                **{"HAS_B_SCALE": True, "GROUP_M": 8},
                **{"BLOCK_M": product.m, "BLOCK_N": product.n, "BLOCK_K": product.k},
            },
            warps=product.warps,
            stages=product.stages,
        ),
        Build(
            kernel=kernels.weight_gradient_kernel,
            pointers={
                **{"grad_ptr": "bf16", "codes_ptr": "i8"},
                **{"scale_ptr": "fp32", "partial_ptr": "fp32"},
            },
            numbers=("num_rows", "num_outputs", "num_inputs", "grad_stride", "rows_per_split"),
            constants={
                "DOT_IN_BF16": True,
                **{"BLOCK_M": gradient.m, "BLOCK_N": gradient.n, "BLOCK_K": gradient.k},
            },
            warps=gradient.warps,
            stages=gradient.stages,
        ),
    ]


def describe(build: Build, architecture: int) -> dict[str, Any]:
    compiled = build.compile(architecture)
    instructions = sorted(set(TENSOR_CORE.findall(compiled.asm["ptx"])))
    return {
        "kernel": build.kernel.__name__,
        "architecture": architecture,
        "tensor_core": instructions,
        "shared_bytes": compiled.metadata.shared,
        "code_bytes": len(compiled.asm["cubin"]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for every GPU generation.")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("error: TRITON_INTERPRET is set and replaces the compiler; unset it", file=sys.stderr)
        return 2
    for architecture in options.arch:
        for build in builds(architecture):
            row = describe(build, architecture)
            line = f"sm_{architecture:<4} {row['kernel']:24} {row['shared_bytes']:>7} B shared  "
            print(json.dumps(row) if options.json else line + " ".join(row["tensor_core"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
