"""Builds of what mixes positions: the scan and differential attention (see kernel_builds.py)."""

from __future__ import annotations

from typing import Any

from model import attention_kernel_src as attention
from model import rank_norm_kernels as rank_norm
from model import sigma_kernel_backward as backward
from model import sigma_kernel_src as scan
from model.attention_kernels import AttentionShape, attention_tiles
from model.kernel_build import Build
from model.sigma_kernels import ScanShape, scan_tiles


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


def rank_norm_builds() -> list[Build]:
    """The gated norm behind the scan at the default network's sizes; it has no products."""
    found = []
    for kernel in (rank_norm.rank_norm_kernel, rank_norm.rank_norm_backward_kernel):
        names = kernel.arg_names
        found.append(
            Build(
                kernel=kernel,
                pointers={name: "fp32" for name in names if name.endswith("_ptr")},
                numbers=("num_rows", "z_stride"),
                reals=("eps",),
                constants=rank_norm.rank_norm_constants(24, 4, 64, has_gate=True),
            )
        )
    return found


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
