"""One small Triton kernel, so that a program can show that its Triton works before it needs it.

A frozen program loses Triton in several ways that no import shows: the kernel's source text is not
packed, no backend is registered, ptxas or the headers are missing. Compiling a kernel that nothing
else depends on meets them all, and needs no GPU. Import this module only where triton is installed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BLOCK = 256
WARP_THREADS = 32
SIGNATURE = {
    "x_ptr": "*fp32",
    "y_ptr": "*fp32",
    "out_ptr": "*fp32",
    "scale": "fp32",
    "length": "i64",
    "BLOCK": "constexpr",
}


def scaled_add_definition(x: Tensor, y: Tensor, *, scale: float) -> Tensor:
    """x + scale * y; x, y and the result (N,) float32."""
    return x + scale * y


@triton.jit
def scaled_add_kernel(x_ptr, y_ptr, out_ptr, scale, length, BLOCK: tl.constexpr):
    """out[i] = x[i] + scale * y[i] for i < length, one program per BLOCK elements."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    x = tl.load(x_ptr + index, mask=inside)
    y = tl.load(y_ptr + index, mask=inside)
    tl.store(out_ptr + index, x + scale * y, mask=inside)


def scaled_add(x: Tensor, y: Tensor, *, scale: float, out: Tensor) -> Tensor:
    """The definition by the kernel, into `out`; contiguous (N,) float32 of equal length.

    On a CPU only under TRITON_INTERPRET=1, else Triton says that it has no active driver.
    """
    if not (x.shape == y.shape == out.shape and x.dim() == 1):
        raise ValueError("scaled_add takes three vectors of equal length")
    if not all(vector.is_contiguous() for vector in (x, y, out)):
        raise ValueError("scaled_add takes contiguous vectors")
    grid = (triton.cdiv(x.numel(), BLOCK),)
    launch = scaled_add_kernel[grid]
    launch(x, y, out, scale, x.numel(), BLOCK=BLOCK)  # pyright: ignore[reportArgumentType]
    return out


def compile_probe(*, capability: int = 80) -> bytes:
    """Machine code (a cubin) of the kernel for compute capability 8.0 and so on; needs no GPU.

    Served from the cache folder (TRITON_CACHE_DIR) when it was compiled before.
    """
    source = ASTSource(fn=scaled_add_kernel, signature=SIGNATURE, constexprs={"BLOCK": BLOCK})
    target = GPUTarget("cuda", capability, WARP_THREADS)
    return triton.compile(source, target=target).asm["cubin"]
