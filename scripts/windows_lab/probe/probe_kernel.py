"""The kernel of the probe program: it doubles a vector."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def doubling_kernel(x_ptr, out_ptr, length, BLOCK: tl.constexpr):
    """out[i] = 2 x[i] for i < length."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < length
    tl.store(out_ptr + index, 2.0 * tl.load(x_ptr + index, mask=inside), mask=inside)
