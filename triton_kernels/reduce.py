"""The end of a product: `y = (s_x * s_w) * acc + b`, and the sum of split-K partials before it.

    partials [SPLIT_K, M, N] fp32 or int32  ->  y [M, N]

Partials are summed in the order of their split, by one program per output element, without atomics:
the same call gives the same bits, always.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numerics import round_to

_REDUCE_BLOCK = 512  # 4 warps * 4 elements * 32 lanes: one 16-byte load of a partial per lane


@triton.jit
def epilogue(acc, m, n, m_mask, n_mask, x_scale_ptr, x_scale_stride, w_scale_ptr, bias_ptr):
    """fp32 `(s_x[m] * s_w[n]) * acc + b[n]`; m and n are index tiles that broadcast to acc."""
    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        scale = tl.load(x_scale_ptr + m * x_scale_stride, mask=m_mask)
        if w_scale_ptr is not None:
            w_scale = tl.load(w_scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
            scale = scale * w_scale
        y = y * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def sum_partials_kernel(
    partials_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    x_scale_stride,
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
    y = epilogue(acc, m, n, None, mask, x_scale_ptr, x_scale_stride, w_scale_ptr, bias_ptr)
    y = round_to(y, out_ptr.dtype.element_ty)
    tl.store(out_ptr + m.to(tl.int64) * N + n, y, mask=mask)


def sum_partials(
    partials: Tensor,
    out: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Writes `(s_x * s_w) * sum(partials) + b` to `out`.

    partials [SPLIT_K, M, N] fp32 or int32, out [M, N]; x_scale fp32 [M] or [1], w_scale [N], bias
    [N] or None each; w_scale needs x_scale.
    """
    split_k, m, n = partials.shape
    assert w_scale is None or x_scale is not None, "a weight scale alone has no place here"
    sum_partials_kernel[(m, triton.cdiv(n, _REDUCE_BLOCK))](
        partials,
        x_scale,
        w_scale,
        bias,
        out,
        m,
        n,
        x_scale_stride(x_scale),
        SPLIT_K=split_k,
        BLOCK=_REDUCE_BLOCK,
        enable_fp_fusion=True,
    )


def x_scale_stride(x_scale: Tensor | None) -> int:
    """Elements from one row's scale to the next: 0 where one scale serves all rows."""
    return 0 if x_scale is None or x_scale.numel() == 1 else 1


def new_partials(split_k: int, m: int, n: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Workspace [SPLIT_K, M, N] on the device of `like`."""
    return torch.empty((split_k, m, n), dtype=dtype, device=like.device)
