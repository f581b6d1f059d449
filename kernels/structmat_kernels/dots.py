"""Products of tiles, shared by the kernels."""

# The language of kernels is not the Python that type checkers know.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _round_tf32(a):
    # The matrix units drop the low bits of a float32; rounding first makes the error unbiased and three times smaller.
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` with float32 accumulation; PRECISION is "ieee" or "tf32" (see backend.dot_precision)."""
    if PRECISION == "tf32":
        a = _round_tf32(a)
        b = _round_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)
