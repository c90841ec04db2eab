"""What calibration spends its time on, in C++ for tensors on the CPU: see csrc/cpu/calibration.h.

Each function has a form in torch where it is called, which stands for it on other devices and
without `qkernels._C`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels import compiled, rounding
from qkernels.backends.cpu import best_isa
from qkernels.weight import WeightParameters


def _compiled() -> Any:
    return compiled.extension()


def runs_on(tensor: Tensor) -> bool:
    """Whether tensors where this one lies are for compiled code, which a `qkernels._C` that was
    built earlier lacks."""
    return tensor.device.type == "cpu" and hasattr(_compiled(), "search_scales_cpu")


_LONGEST_BLOCK = 256
"""Columns of a group whose block of x^T x stays in a cache; torch's product is for longer ones."""


def searches_scales(weight: Tensor, parameters: WeightParameters, blocks: bool) -> bool:
    """Whether `search_scales` takes them: linear weights whose groups have floating scales, or
    multiples of a channel's.

    Args:
        blocks: for costs by blocks of x^T x.
    """
    scheme, zeros = parameters.scheme, parameters.zeros
    return (
        runs_on(weight)
        and scheme.weight.kind == "linear"
        and scheme.scale_levels in ("one", "two")
        and not scheme.per_tensor
        and not (blocks and scheme.group_length(parameters.k) > _LONGEST_BLOCK)
        and (zeros is None or zeros.dtype == torch.uint8)
        and (weight.shape[1] == 1 or weight.stride(1) == 1)
    )


def search_scales(
    weight: Tensor,
    parameters: WeightParameters,
    *,
    diagonal: Tensor | None = None,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scales and zero points of least cost, as the fields of `parameters` have them.

    Args:
        weight: fp16, bf16 or fp32 [N, K].
        parameters: where the search begins.
        diagonal: fp32 [K], what squares of the error of each column weigh; None: all the same.
        gram: fp32 [K, K], symmetric, in place of it: a cost is e G e^T of its block G.
    """
    scheme, zeros, channels = parameters.scheme, parameters.zeros, parameters.channel_scales
    found, moved = _compiled().search_scales_cpu(
        weight,
        parameters.scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        None if channels is None else channels.contiguous(),
        None if diagonal is None else diagonal.contiguous(),
        None if gram is None else gram.contiguous(),
        scheme.group_length(parameters.k),
        scheme.bits,
        float(scheme.implied_zero),
        0.0 if channels is not None else rounding.least_scale(scheme.scale_dtype),
        float(rounding.most_multiplier(scheme)) if channels is not None else 0.0,
        best_isa(),
    )
    return found, moved


def round_columns(
    left: Tensor,
    factors: Tensor,
    values: Tensor | None,
    places: Tensor,
    groups: Tensor,
    scales: Tensor,
    zeros: Tensor | float,
    limits: tuple[Tensor, Tensor],
    codes: Tensor,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rounds columns of linear weights one after the other, each with what those before it left:
    see `columns.Columns.round_block`.

    Args:
        scales, zeros, limits: fp32 [G, N]; one zero point that all have, or one each.
        kept: fp32 [B, N], above 0 where a number is kept as it is, beside its code.

    Returns:
        `moved`, and with `kept` what such numbers are beyond their codes, fp32 [B, N].
    """
    low, high = limits
    stored = isinstance(zeros, Tensor)
    moved, beyond = _compiled().round_columns_cpu(
        left,
        factors.contiguous(),
        values,
        places,
        groups,
        scales,
        zeros if stored else None,
        0.0 if stored else zeros,
        low,
        high,
        codes,
        kept,
        best_isa(),
    )
    return moved, beyond


def transposed_product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y, fp32 [K, L], of floating x [T, K] and y [T, L]; symmetric where y is x.

    Products of bf16 are exact, and those of fp32 rounded with their sum.
    """
    if not runs_on(x):
        return x.float().t() @ y.float()
    isa = best_isa()
    types = {x.dtype, y.dtype}
    if types == {torch.bfloat16} and _compiled().multiplies_transposed_cpu(torch.bfloat16, isa):
        dtype = torch.bfloat16
    elif _compiled().multiplies_transposed_cpu(torch.float32, isa):
        dtype = torch.float32
    else:
        return x.float().t() @ y.float()
    left = x.to(dtype).contiguous()
    right = left if y is x else y.to(dtype).contiguous()
    product: Tensor = _compiled().transposed_product_cpu(left, right, isa)
    return product
