"""The same numbers in the terms of a format that has fewer of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels.weight import QuantizedWeight


def are_codes(zeros: Tensor, bits: int) -> bool:
    """Whether zero points are integers of 0..2^bits - 1, in whatever type they are stored."""
    if not zeros.is_floating_point():
        return True
    if zeros.is_meta:
        return False
    inside = (zeros >= 0) & (zeros < 1 << bits)
    return bool((inside & (zeros == zeros.round())).all())


def with_integer_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight with its zero points, which `are_codes`, in uint8."""
    zeros = weight.zeros
    if zeros is None or not zeros.is_floating_point():
        return weight
    return weight.replace(zeros=zeros.to(torch.uint8))


def by_channel(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight whose one scale, and zero point, stands for each channel."""
    if not weight.scheme.per_tensor:
        return weight
    zeros = weight.zeros
    return weight.replace(
        scheme=replace(weight.scheme, per_tensor=False),
        scales=weight.scales.expand(weight.n, 1).contiguous(),
        zeros=None if zeros is None else zeros.expand(weight.n, 1).contiguous(),
    )
