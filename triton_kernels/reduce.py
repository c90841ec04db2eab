"""The end of a product: `y = (s_x * s_w) * acc + b`, and the sum of split-K partials before it.

    partials [SPLIT_K, M, N] fp32 or int32  ->  y [M, N]

Partials are summed in the order of their split, by one program per output element, without atomics:
the same call gives the same bits, always.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div
from .numerics import round_to

_REDUCE_BLOCK = 512  # 4 warps * 4 elements * 32 lanes: one 16-byte load of a partial per lane


class Ending(NamedTuple):
    """What becomes of the sums: x_scale fp32 [M] or [1], w_scale [N] and bias [N], or None each.

    `x_scale_stride` is 0 where one scale serves all rows. `w_scale` needs `x_scale`.
    """

    x_scale: Any
    x_scale_stride: Any
    w_scale: Any
    bias: Any


def ending_of(x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None) -> Ending:
    """The `Ending` of these scales and this bias."""
    assert w_scale is None or x_scale is not None, "a weight scale alone has no place here"
    stride = 0 if x_scale is None or x_scale.numel() == 1 else 1
    return Ending(x_scale, stride, w_scale, bias)


@triton.jit
def finish(acc, m, n, m_mask, n_mask, ending):
    """fp32 `(s_x[m] * s_w[n]) * acc + b[n]`; m and n are index tiles that broadcast to acc."""
    y = acc.to(tl.float32)
    if ending.x_scale is not None:
        scale = tl.load(ending.x_scale + m * ending.x_scale_stride, mask=m_mask)
        if ending.w_scale is not None:
            w_scale = tl.load(ending.w_scale + n, mask=n_mask, other=0.0).to(tl.float32)
            scale = scale * w_scale
        y = y * scale
    if ending.bias is not None:
        y += tl.load(ending.bias + n, mask=n_mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def store_product(out_ptr, acc, m, n, m_mask, n_mask, split, M, N, ending, SPLIT_K: tl.constexpr):
    """Writes the sums of a program: y where it has them all, else its partial [M, N]."""
    index = m.to(tl.int64) * N + n
    mask = n_mask if m_mask is None else m_mask & n_mask
    if SPLIT_K == 1:
        y = finish(acc, m, n, m_mask, n_mask, ending)
        tl.store(out_ptr + index, round_to(y, out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out_ptr + split * (tl.cast(M, tl.int64) * N) + index, acc, mask=mask)


@triton.jit(do_not_specialize=["M"])
def sum_partials_kernel(
    partials_ptr,
    ending,
    out_ptr,
    M,
    N,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = n < N
    row = partials_ptr + m.to(tl.int64) * N + n
    size = tl.cast(M, tl.int64) * N
    acc = tl.load(row, mask=mask, other=0)
    for split in tl.static_range(1, SPLIT_K):
        acc += tl.load(row + split * size, mask=mask, other=0)
    store_product(out_ptr, acc, m, n, None, mask, 0, M, N, ending, 1)


def sum_launch(partials: Tensor, out: Tensor, ending: Ending) -> Launch:
    """The launch that writes the ending of sum(partials), [SPLIT_K, M, N], to `out` [M, N]."""
    split_k, m, n = partials.shape
    arguments = {
        "partials_ptr": partials,
        "ending": ending,
        "out_ptr": out,
        "M": m,
        "N": n,
        "SPLIT_K": split_k,
        "BLOCK": _REDUCE_BLOCK,
    }
    grid = (m, ceil_div(n, _REDUCE_BLOCK))
    return Launch(sum_partials_kernel, grid, arguments, {"enable_fp_fusion": True})
