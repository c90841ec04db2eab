"""Quantized weights to measure with: random codes, scales and zero points of any scheme.

Codes are uniform over their range. No quantizer runs: what a kernel does with a code does not
depend on how it was found, and quantizing gigabytes would take longer than timing them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qkernels.scheme import QuantScheme
from qkernels.weight import NESTED_BLOCK, NestedScales, QuantizedWeight

TYPICAL_WEIGHT = 0.02
"""Standard deviation of the weights, as in a trained layer: y then stays in the range of fp16."""

ACTIVATION_RANGE = 5.0
"""Largest |x| that a static activation scale covers: five standard deviations of x."""


def generator(seed: int, device: str) -> torch.Generator:
    """A random generator on `device`, so that two runs measure the same numbers."""
    return torch.Generator(device=device).manual_seed(seed)


def random_weight(scheme: QuantScheme, n: int, k: int, device: str, seed: int) -> QuantizedWeight:
    """A random quantized weight [n, k] without bias on `device`."""
    source = generator(seed, device)

    def uniform(shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=source, device=device) * (high - low) + low

    def integers(shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=source, device=device, dtype=torch.uint8)

    shape = (1, 1) if scheme.per_tensor else (n, scheme.groups(k))
    codes = _codes(scheme, integers, n, k)
    middle = 1 << (scheme.bits - 1)
    spread = max(middle // 4, 1)
    zeros = None if scheme.symmetric else integers(shape, middle - spread, middle + spread)
    step = TYPICAL_WEIGHT / _code_spread(scheme)
    channel_scales = nested = None
    if scheme.scale_levels == "two":
        # Keeps multiplier * (code - zero) inside int8 for every code and zero point.
        largest = 127 // (middle + spread)
        scales = integers(shape, max(largest // 2, 1), largest + 1)
        channel_scales = uniform((n,), 0.5 * step, 1.5 * step) / largest
    elif scheme.scale_levels == "double":
        scales = integers(shape, 0, 256)
        blocks = -(-scales.numel() // NESTED_BLOCK)
        nested = NestedScales(
            absmax=uniform((blocks,), 0.2 * step, 0.4 * step),
            offset=torch.tensor(step, device=device),
        )
    else:
        scales = uniform(shape, 0.5 * step, 1.5 * step).to(scheme.scale_dtype)
    activation_scale = None
    if scheme.activation.granularity == "static":
        top = 127.0 if scheme.integer_activation else 448.0
        activation_scale = torch.tensor(ACTIVATION_RANGE / top, device=device)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales,
        zeros=zeros,
        channel_scales=channel_scales,
        nested=nested,
        activation_scale=activation_scale,
    )


def _codes(
    scheme: QuantScheme, integers: Callable[[tuple[int, ...], int, int], Tensor], n: int, k: int
) -> Tensor:
    if scheme.weight.kind != "float8":
        # 8-bit symmetric kernels may hold code - 128 as int8; 0 would be -128, which no
        # symmetric quantizer emits.
        lowest = 1 if scheme.weight.kind == "linear" and scheme.symmetric else 0
        return integers((n, k), lowest, 1 << scheme.bits)
    codes = integers((n, k), 0, 256)
    assert scheme.weight.float_dtype is not None
    values = codes.view(scheme.weight.float_dtype)
    # Bit patterns of NaN and infinity (and of huge numbers that would drown all others) become 1.
    one = torch.ones((), dtype=scheme.weight.float_dtype).view(torch.uint8).to(codes.device)
    return torch.where(values.float().abs() <= 16, codes, one)


def _code_spread(scheme: QuantScheme) -> float:
    """About the standard deviation of the values that codes stand for."""
    if scheme.weight.kind == "linear":
        return (1 << scheme.bits) / 12**0.5
    if scheme.weight.kind == "codebook":
        assert scheme.weight.values is not None
        return float(torch.tensor(scheme.weight.values).std())
    return 4.0


def scheme_bytes(weight: QuantizedWeight) -> int:
    """The fewest bytes the scheme needs for `weight`: packed codes, scales and zero points.

    Zero points count with the bits of a code, since that is all they hold.
    """
    bits = weight.codes.numel() * weight.scheme.bits
    if weight.zeros is not None:
        zero_bits = weight.scheme.bits if weight.zeros.dtype == torch.uint8 else 16
        bits += weight.zeros.numel() * zero_bits
    others = [weight.scales, weight.channel_scales, weight.activation_scale]
    if weight.nested is not None:
        others += [weight.nested.absmax, weight.nested.offset]
    return -(-bits // 8) + sum(t.numel() * t.element_size() for t in others if t is not None)
