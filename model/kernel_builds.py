"""Every kernel of the program as a launch would specialise it, to compile it before there is a GPU.

One list for two readers: `scripts/compile_kernels.py` shows what each architecture makes of a
kernel, and the self-check of a packed program (`--mode doctor --self-check`) sees that none of what
compiling needs was left behind. A new kernel gets its line here. Import only where triton is.
"""

from __future__ import annotations

from model import (
    cross_entropy_kernels,
    expert_kernels,
    fused_cross_entropy,
    norm_kernels,
    norm_linear,
    ternary_experts,
)
from model import triton_kernels as kernels
from model.kernel_build import Build
from model.sequence_builds import attention_builds, rank_norm_builds, scan_builds
from model.ternary_linear import gradient_tiles, product_tiles, row_block

ITEM_BYTES = {"bf16": 2, "fp32": 4}  # of the operands that a kernel of several may multiply


def builds(architecture: int, operands: tuple[str, ...] = tuple(ITEM_BYTES)) -> list[Build]:
    """All kernels with the launch settings that their launchers choose on this architecture."""
    found = [*_linear_builds(architecture, operands), *_norm_builds(), *rank_norm_builds()]
    for kind in operands:
        found += _cross_entropy_builds(architecture, kind)
        found += _expert_builds(architecture, kind)
        found += scan_builds(architecture, kind)
        found += attention_builds(architecture, kind)
    return found


def _linear_builds(architecture: int, operands: tuple[str, ...]) -> list[Build]:
    product, gradient = product_tiles(16384, architecture), gradient_tiles(architecture)
    return [
        Build(
            kernel=kernels.quantize_rows_kernel,
            pointers={
                **{"x_ptr": "bf16", "column_scale_ptr": "fp32"},
                **{"codes_ptr": "i8", "scale_ptr": "fp32"},
                **{"source_ptr": "i64", "expert_ptr": "i64"},
            },
            numbers=("num_rows", "num_columns", "x_stride"),
            constants={
                **{"HAS_COLUMN_SCALE": True, "HAS_SOURCE": True, "HAS_EXPERT": True},
                **row_block(1024).constants(),
            },
            warps=row_block(1024).warps,
        ),
        Build(
            kernel=kernels.ternarize_kernel,
            pointers={
                **{"weight_ptr": "fp32", "codes_ptr": "i8"},
                **{"codes_t_ptr": "i8", "scale_ptr": "fp32"},
            },
            numbers=("num_rows", "num_columns", "weight_stride", "rows_per_matrix"),
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
        *(
            Build(
                kernel=kernels.weight_gradient_kernel,
                pointers={
                    **{"grad_ptr": kind, "codes_ptr": "i8"},
                    **{"scale_ptr": "fp32", "partial_ptr": "fp32"},
                },
                numbers=("num_rows", "num_outputs", "num_inputs", "grad_stride", "rows_per_split"),
                constants={
                    "DOT_IN_BF16": kind == "bf16",
                    **{"BLOCK_M": gradient.m, "BLOCK_N": gradient.n, "BLOCK_K": gradient.k},
                },
                warps=gradient.warps,
                stages=gradient.stages,
                use=kind,
            )
            for kind in operands
        ),
    ]


def _cross_entropy_builds(architecture: int, kind: str) -> list[Build]:
    tiles = fused_cross_entropy.logits_tiles(architecture, ITEM_BYTES[kind])
    launch = {"warps": tiles.warps, "stages": tiles.stages, "use": kind}
    logits = {"BLOCK_M": tiles.m, "BLOCK_V": tiles.n, "BLOCK_K": tiles.k}
    given = {"hidden_ptr": kind, "weight_ptr": kind, "labels_ptr": "i64"}
    sizes = ("num_rows", "vocabulary", "depth", "hidden_stride", "weight_stride")
    result = [
        Build(
            kernel=cross_entropy_kernels.logit_statistics_kernel,
            pointers={**given, "normaliser_ptr": "fp32", "picked_ptr": "fp32"},
            numbers=(*sizes, "blocks_per_split"),
            constants=logits,
            **launch,
        ),
        Build(
            kernel=cross_entropy_kernels.logit_gradient_kernel,
            pointers={**given, "normaliser_ptr": "fp32", "grad_ptr": kind},
            numbers=(*sizes, "grad_stride"),
            constants={**logits, "GROUP_M": 8, "IGNORED": fused_cross_entropy.IGNORED},
            **launch,
        ),
    ]
    # dh = G W, and dW = G^T h with the depth along G's rows.
    for add, unit, stride in (
        (False, "a_depth_stride", "a_row_stride"),
        (True, "a_row_stride", "a_depth_stride"),
    ):
        product = {"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": 8}
        result.append(
            Build(
                kernel=cross_entropy_kernels.scaled_product_kernel,
                pointers={
                    **{"a_ptr": kind, "b_ptr": kind},
                    **{"scale_ptr": "fp32", "out_ptr": "fp32"},
                },
                numbers=(
                    *("num_rows", "num_columns", "depth"),
                    *(stride, "b_stride", "out_stride"),
                ),
                constants={**product, unit: 1, "ADD": add},
                **{**launch, "use": f"{kind} ADD" if add else kind},
            )
        )
    return result


def _expert_builds(architecture: int, kind: str) -> list[Build]:
    gradient, rows = gradient_tiles(architecture), row_block(1024)
    product = ternary_experts.grouped_tiles(2048, architecture, ITEM_BYTES[kind])
    return [
        Build(
            kernel=expert_kernels.grouped_int8_product_kernel,
            pointers={
                **{"a_ptr": "i8", "b_ptr": "i8", "a_scale_ptr": "fp32", "b_scale_ptr": "fp32"},
                **{"out_ptr": kind, "source_ptr": "i64"},
                **{"row_ends_ptr": "i64", "block_ends_ptr": "i64"},
            },
            numbers=("num_experts", "num_outputs", "depth"),
            constants={
                **{"HAS_SOURCE": True, "HAS_B_SCALE": True, "BLOCK_E": 8, "GROUP_M": 8},
                **{"BLOCK_M": product.m, "BLOCK_N": product.n, "BLOCK_K": product.k},
            },
            warps=product.warps,
            stages=product.stages,
            use=kind,
        ),
        Build(
            kernel=expert_kernels.grouped_weight_gradient_kernel,
            pointers={
                **{"grad_ptr": kind, "codes_ptr": "i8", "scale_ptr": "fp32", "out_ptr": "fp32"},
                **{"grad_source_ptr": "i64", "codes_source_ptr": "i64", "row_ends_ptr": "i64"},
            },
            numbers=("num_outputs", "num_inputs"),
            constants={
                **{"HAS_GRAD_SOURCE": True, "HAS_CODES_SOURCE": True},
                **{"DOT_IN_BF16": kind == "bf16"},
                **{"BLOCK_M": gradient.m, "BLOCK_N": gradient.n, "BLOCK_K": gradient.k},
            },
            warps=gradient.warps,
            stages=gradient.stages,
            use=kind,
        ),
        Build(
            kernel=expert_kernels.activate_rows_kernel,
            pointers={
                **{"gate_up_ptr": kind, "codes_ptr": "i8"},
                **{"step_ptr": "fp32", "rate_ptr": "fp32"},
            },
            numbers=("num_rows", "width"),
            constants={"SUB_NORM": True, "EPS": 1e-6, **rows.constants()},
            warps=rows.warps,
            use=kind,
        ),
        Build(
            kernel=expert_kernels.activation_gradient_kernel,
            pointers={
                **{"grad_ptr": kind, "gate_up_ptr": kind, "codes_ptr": "i8"},
                **{"step_ptr": "fp32", "rate_ptr": "fp32", "gates_ptr": "fp32"},
                **{"out_ptr": kind, "grad_gates_ptr": "fp32"},
            },
            numbers=("num_rows", "width"),
            constants={"SUB_NORM": True, "HAS_GATES": True, **rows.constants()},
            warps=rows.warps,
            use=kind,
        ),
        Build(
            kernel=expert_kernels.combine_rows_kernel,
            pointers={
                **{"rows_ptr": kind, "row_of_slot_ptr": "i64"},
                **{"gates_ptr": "fp32", "out_ptr": kind},
            },
            numbers=("num_tokens", "width"),
            constants={"TOP_K": 2, "HAS_GATES": True, **rows.constants()},
            warps=rows.warps,
            use=kind,
        ),
    ]


def _norm_builds() -> list[Build]:
    rows = norm_linear.whole_row_block(1024)
    return [
        Build(
            kernel=norm_kernels.norm_quantize_kernel,
            pointers={
                **{"x_ptr": "bf16", "gain_ptr": "fp32", "codes_ptr": "i8"},
                **{"step_ptr": "fp32", "rate_ptr": "fp32"},
            },
            numbers=("num_rows", "width", "x_stride"),
            constants={"HAS_GAIN": True, "EPS": 1e-6, **rows.constants()},
            warps=rows.warps,
        ),
        Build(
            kernel=norm_kernels.norm_gradient_kernel,
            pointers={
                **{"grad_ptr": "bf16", "x_ptr": "bf16", "gain_ptr": "fp32", "rate_ptr": "fp32"},
                **{"out_ptr": "bf16", "partial_ptr": "fp32"},
            },
            numbers=("num_rows", "width", "grad_stride", "x_stride", "rows_per_program"),
            constants={"HAS_GAIN": True, **rows.constants()},
            warps=rows.warps,
        ),
    ]
