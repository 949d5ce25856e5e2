"""Every kernel of the program as a launch would specialise it, to compile it before there is a GPU.

One list for two readers: `scripts/compile_kernels.py` shows what each architecture makes of a
kernel, and the self-check of a packed program (`--mode doctor --self-check`) sees that none of what
compiling needs was left behind. A new kernel gets its line here. Import only where triton is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import attention_kernel_src as attention
from model import sigma_kernel_backward as backward
from model import sigma_kernel_src as scan
from model import triton_kernels as kernels
from model.attention_kernels import AttentionShape, attention_tiles
from model.sigma_kernels import ScanShape, scan_tiles
from model.ternary_linear import gradient_tiles, product_tiles


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


OPERANDS = ("bf16", "fp32")  # in which a kernel of several may multiply


def builds(architecture: int, operands: tuple[str, ...] = OPERANDS) -> list[Build]:
    """All kernels with the launch settings that their launchers choose on this architecture."""
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
        *(build for kind in operands for build in scan_builds(architecture, kind)),
        *(build for kind in operands for build in attention_builds(architecture, kind)),
    ]


def scan_builds(architecture: int, operands: str) -> list[Build]:
    """The scan's kernels at the default network's sizes, with document boundaries, and each of the
    two uses of a kernel that serves forward and backward."""
    in_bf16 = operands == "bf16"
    shape = ScanShape(
        *(4, 512, 24, 4, 128, 64, 128),  # B, T, H, R, N, P, L
        tiles=scan_tiles(128, 128, 64, architecture, in_bf16=in_bf16),
        has_rank_in=True,
        has_resets=True,
        in_bf16=in_bf16,
    )
    return [_scan_build(shape, kernel, use) for kernel, uses in _SCAN_KERNELS for use in uses]


_SCAN_KERNELS: tuple[tuple[Any, tuple[dict[str, Any], ...]], ...] = (
    (scan.chunk_controls_kernel, ({},)),
    (scan.chunk_scores_kernel, ({},)),
    (scan.chunk_states_kernel, ({"OF_OUTPUTS": False}, {"OF_OUTPUTS": True})),
    (scan.pass_states_kernel, ({"HAS_START": True},)),
    (scan.scan_outputs_kernel, ({},)),
    (backward.pass_states_backward_kernel, ({"HAS_GRAD_FINAL": True, "HAS_START": True},)),
    (backward.input_gradient_kernel, ({},)),
    (backward.score_gradient_kernel, ({},)),
    (backward.shared_gradient_kernel, ({"OF_C": False}, {"OF_C": True})),
    (backward.control_gradients_kernel, ({},)),
)


def _scan_build(shape: ScanShape, kernel: Any, use: dict[str, Any]) -> Build:
    """Operands rounded to bf16 are b, c and their products; the rest is fp32."""
    rounded = {"b_ptr", "c_ptr", "shared_ptr", "other_ptr", "scores_ptr", "grad_scores_ptr"}
    names = kernel.arg_names
    pointers = {name: "fp32" for name in names if name.endswith("_ptr")}
    pointers |= {name: "bf16" for name in rounded & set(names) if shape.in_bf16}
    if "segments_ptr" in pointers:
        pointers["segments_ptr"] = "i32"
    return Build(
        kernel=kernel,
        pointers=pointers,
        numbers=tuple(n for n in names if not n.endswith("_ptr") and not n.isupper()),
        constants=shape.constants_of(kernel, **use),
        warps=shape.tiles.warps,
        stages=shape.tiles.stages,
        use=" ".join(["bf16" if shape.in_bf16 else "fp32", *(k for k, v in use.items() if v)]),
    )


def attention_builds(architecture: int, operands: str) -> list[Build]:
    """Differential attention at the default network's sizes, with documents; bf16 throughout but
    for the statistics of rows and the heads' parts of the rotary key's gradient."""
    in_bf16 = operands == "bf16"
    shape = AttentionShape(
        *(4, 512, 512, 2, 12, 64, 32, 64),  # B, T, S, maps, H, widths of content, rotary, value
        tiles=attention_tiles(64, architecture, in_bf16=in_bf16),
        has_documents=True,
        in_bf16=in_bf16,
    )
    exact = ("lam_ptr", "log_sum_ptr", "delta_ptr", "grad_k_rope_ptr")
    found = []
    for kernel in (
        *(attention.attention_kernel, attention.delta_kernel),
        *(attention.query_gradient_kernel, attention.key_gradient_kernel),
    ):
        names = [name for name in kernel.arg_names if name.endswith("_ptr")]
        pointers = {n: "bf16" if in_bf16 and n not in exact else "fp32" for n in names}
        if "documents_ptr" in pointers:
            pointers["documents_ptr"] = "i32"
        numbers = (n for n in kernel.arg_names if n not in names and not n.isupper())
        found.append(
            Build(
                kernel=kernel,
                pointers=pointers,
                numbers=tuple(name for name in numbers if name != "scale"),
                reals=tuple(name for name in kernel.arg_names if name == "scale"),
                constants=shape.constants_of(kernel),
                warps=shape.tiles.warps,
                stages=shape.tiles.stages,
                use=operands,
            )
        )
    return found
