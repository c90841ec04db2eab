"""What a quantized layer must give: formulas in float64 that share no code with what they judge."""

import torch
from torch import Tensor

from qkernels import QuantizedWeight
from qkernels.weight import nested_table

WEIGHT_BOUND = 2**-22
"""|W - exact| / |exact| of each element of a dequantized weight: two roundings of fp32."""


def with_order(weight: QuantizedWeight, perm: Tensor) -> QuantizedWeight:
    """Another weight of the same codes: column j of them is its column perm[j]."""
    return weight.replace(perm=perm)


def _scales(weight: QuantizedWeight) -> Tensor:
    """[N, G]; or [1, 1], of the whole tensor."""
    scales = weight.scales
    if weight.scheme.scale_levels == "double":
        # Blocks of 256 follow each other through all rows.
        block = torch.arange(scales.numel()) // 256
        top = weight.nested_absmax[block].view(scales.shape)
        return nested_table(scales.device)[scales.long()] * top + weight.nested_offset
    if weight.scheme.scale_levels == "two":
        return scales.double() * weight.channel_scales.double()[:, None]
    if weight.scheme.scale_levels == "blocks":
        return _in_blocks(weight, weight.scales % 16, 0)
    return scales


def _in_blocks(weight: QuantizedWeight, codes: Tensor, first: int) -> Tensor:
    """[N, G] of codes in the steps of 16 rows: a product and a sum, each rounded to fp32."""
    ranges = weight.block_ranges.float().repeat_interleave(16, dim=0)[: len(codes)]
    return codes * ranges[:, :, first] + ranges[:, :, first + 1]


def _values(weight: QuantizedWeight) -> Tensor:
    kind = weight.scheme.weight
    if kind.kind == "codebook":
        return torch.tensor(kind.values, dtype=torch.float64)[weight.codes.long()]
    if kind.kind == "float8":
        return weight.codes.view(kind.float_dtype).double()
    return weight.codes.double() - (2 ** (kind.bits - 1) if weight.scheme.symmetric else 0)


def dense(weight: QuantizedWeight) -> Tensor:
    """The weight itself, float64 [N, K], in its own column order."""
    n, k = weight.codes.shape
    group = torch.arange(k) // (weight.scheme.group_size or k)

    def spread(groups: Tensor) -> Tensor:
        return groups.double().expand(n, int(group[-1]) + 1)[:, group]

    values = _values(weight)
    if weight.scheme.scale_levels == "blocks":
        values = values - spread(_in_blocks(weight, weight.scales // 16, 2))
    elif weight.zeros is not None:
        values = values - spread(weight.zeros)
    values = values * spread(_scales(weight))
    return values if weight.perm is None else values[:, weight.perm.argsort()]


def rounded(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """x [M, K] as its scheme multiplies it, float64: what 8 or 4 bits leave of it."""
    activation = weight.scheme.activation
    largest = {"none": None, "int8": 127.0, "int4": 7.0, "fp8": 448.0}[activation.dtype]
    if activation.dtype == "none":
        return x.double()
    if activation.has_zeros:
        return _rounded_with_zeros(weight, x.float(), largest)
    if activation.outliers:
        apart = (x.abs() >= activation.outliers).any(dim=0)
        left = torch.where(apart, 0, x.float())
        scale = left.abs().amax(1, keepdim=True) / largest
        kept = (left / torch.where(scale == 0, 1, scale)).round() * scale
        return torch.where(apart, x.double(), kept.double())
    tops = {"token": x.float().abs().amax(1, keepdim=True), "tensor": x.float().abs().amax()}
    if activation.granularity == "static":
        scale = weight.activation_scale
    elif activation.granularity == "position":
        scale = weight.activation_scale[_positions(weight, x), None]
    else:
        scale = tops[activation.granularity] / largest
    codes = (x.float() / scale).clamp(-largest, largest)
    codes = codes.to(torch.float8_e4m3fn) if activation.dtype == "fp8" else codes.round()
    return codes.double() * scale.double()


def _positions(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """Of the rows of x [M, K], which is one sequence, among those that have a scale: int64 [M]."""
    last = weight.activation_scale.numel() - 1
    return torch.tensor([min(row, last) for row in range(len(x))], dtype=torch.int64)


def _rounded_with_zeros(weight: QuantizedWeight, x: Tensor, most: float) -> Tensor:
    least = -most - 1
    if weight.scheme.activation.by_position:
        own = _positions(weight, x)
        scale, zero = weight.activation_scale[own, None], weight.activation_zero[own, None]
    elif weight.scheme.activation.is_static:
        scale, zero = weight.activation_scale, weight.activation_zero
    else:
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (most - least)
        zero = (least - (low / scale).round()).clamp(least, most)
    codes = ((x / scale).round() + zero).clamp(least, most)
    return (codes - zero).double() * scale.double()


def product(weight: QuantizedWeight, x: Tensor) -> Tensor:
    """y, float64 [M, N], for x [M, K]."""
    y = rounded(weight, x) @ dense(weight).t()
    return y if weight.bias is None else y + weight.bias.double()


def error(y: Tensor, exact: Tensor) -> float:
    """|y - exact| / |exact|, Frobenius."""
    return float((y.double() - exact).norm() / exact.norm())
