"""Quantized weights to measure with: random numbers, rounded to nearest under any scheme."""

from __future__ import annotations

import torch

from qkernels import rounding
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

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
    weight = torch.randn(n, k, generator=source, device=device).mul_(TYPICAL_WEIGHT)
    activation_scale = None
    if scheme.activation.granularity in ("static", "position"):
        activation_scale = ACTIVATION_RANGE / scheme.activation.largest
    return rounding.quantize(weight, scheme, activation_scale=activation_scale)


def scheme_bytes(weight: QuantizedWeight) -> int:
    """The fewest bytes the scheme needs for `weight`: packed codes, and its fields as they are.

    Integer zero points count with the bits of a code, since that is all they hold.
    """
    bits = weight.codes.numel() * weight.scheme.bits
    for name, value in weight.fields.items():
        is_code = name == "zeros" and value.dtype == torch.uint8
        bits += value.numel() * (weight.scheme.bits if is_code else 8 * value.element_size())
    return -(-bits // 8)
