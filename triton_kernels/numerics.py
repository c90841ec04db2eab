"""Rounding and products that give the same bits in Triton's interpreter as on a GPU.

The interpreter (TRITON_INTERPRET=1) truncates on casts to bfloat16 and multiplies the raw bits of
bfloat16 operands in `tl.dot`. Both are worked around here, and nowhere else; the workarounds are
under a compile-time constant, so that compiled kernels contain none of them.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels of this process run in the interpreter. Triton decides it at import."""


@triton.jit
def round_to(v, DTYPE: tl.constexpr):
    """fp32 tile -> DTYPE, to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = v.to(tl.int32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(is_nan, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
        v = (bits & -65536).to(tl.float32, bitcast=True)
    return v.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32 (or int32 for int8 operands); fp32 operands are not cut to TF32."""
    if INTERPRETED and acc.dtype == tl.float32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)
