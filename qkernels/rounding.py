"""Round to nearest: scales from the range of each group, codes from the nearest value.

Two steps, since the codes of a large weight are never held whole: `fit` finds the parameters of all
rows, `encode_rows` the codes of some of them. Methods of quantization reuse both.

    symmetric     s = max|w| / ((2^b - 1) / 2), codes clamped to [0, 2^b - 1]
    asymmetric    s = (max(w, 0) - min(w, 0)) / (2^b - 1), z = round(-min(w, 0) / s)
    codebook, fp8 s = max|w| / the type's largest value; binary: s = mean |w|

A group of zeros stays zero: its codes stand for zero, under the least scale that its type has, so
that a kernel which takes zero points off its sums leaves nothing either. Where no code stands for
zero, as in binary weights, that scale is zero itself.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import WeightError
from qkernels.fields import NESTED_BLOCK, SCALE_BLOCK
from qkernels.lasting import once_a_device
from qkernels.scheme import QuantScheme, WeightType
from qkernels.weight import (
    QuantizedWeight,
    WeightParameters,
    apply_by_group,
    nested_table,
    row_slices,
)

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Raises WeightError unless `weight` is a finite floating [N, K] with data."""
    if weight.dim() != 2 or 0 in weight.shape:
        raise WeightError(f"{name} must be [N, K] with N, K >= 1, got {list(weight.shape)}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise WeightError(f"{name} must be fp16, bf16 or fp32, got {weight.dtype}")
    if weight.device.type == "meta":
        raise WeightError(f"{name} is on the meta device and has no values: load it first")
    for start, stop in row_slices(*weight.shape):
        finite = weight[start:stop].isfinite()
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            value = float(weight[start + row, column])
            raise WeightError(f"{name}[{start + row}, {column}] is {value}: it must be finite")


def fit(
    weight: Tensor,
    scheme: QuantScheme,
    *,
    perm: Tensor | None = None,
    activation_scale: Tensor | float | None = None,
) -> WeightParameters:
    """Scales and zero points of `weight` [N, K] by its range.

    Args:
        weight: fp16, bf16 or fp32.
        perm: int64 [K], the column order to quantize in (activation order), or None.
        activation_scale: for static activations: the scale of x, > 0; where each position has one,
            a number for all of them or [P].

    Raises:
        WeightError: for a weight that is not finite, or whose scales overflow their type.
    """
    check_weight(weight)
    n, k = weight.shape
    low, high = _ranges(weight, scheme, perm)
    if scheme.per_tensor:
        low, high = low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True)
    fields: dict[str, Tensor | None] = {"perm": None if perm is None else perm.to(weight.device)}
    if scheme.scale_levels == "two":
        fields |= _two_level(low, high, scheme)
    else:
        full = _step(low, high, scheme)
        if scheme.weight.scale_from == "mean":
            full = _mean_magnitudes(weight, scheme, perm)
        if scheme.scale_levels == "double":
            fields |= _double_quantize(full)
        elif scheme.scale_levels == "one":
            fields["scales"] = scales = _round_scales(full, scheme)
            full = scales.float()
        if scheme.scale_levels == "blocks":
            fields |= quantize_in_blocks(full, -low / nonzero(full), scheme.scale_dtype)
        elif not scheme.symmetric:
            largest = (1 << scheme.bits) - 1
            fields["zeros"] = (-low / nonzero(full)).round_().clamp_(0, largest).to(torch.uint8)
    if activation_scale is not None:
        given = torch.as_tensor(activation_scale, dtype=torch.float32, device=weight.device)
        fields["activation_scale"] = given.reshape(-1 if scheme.activation.by_position else ())
    return WeightParameters(scheme=scheme, n=n, k=k, **fields)


def encode_rows(rows: Tensor, parameters: WeightParameters, start: int) -> Tensor:
    """Codes of weight rows [start, start + R): the nearest values under given parameters.

    Args:
        rows: floating [R, K], in the weight's own column order.

    Returns:
        uint8 [R, K] in the order of `parameters.perm`.
    """
    scheme, stop = parameters.scheme, start + rows.shape[0]
    if parameters.perm is not None:
        rows = rows.index_select(1, parameters.perm)
    length = scheme.group_length(parameters.k)
    scaled = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    beyond = parameters.beyond_codes(start, stop)
    if beyond is not None:
        scaled -= beyond
    scales = nonzero(parameters.group_scales(start, stop))
    apply_by_group(scaled, scales, length, Tensor.div_)
    zeros = parameters.group_zeros(start, stop)
    if zeros is not None:
        apply_by_group(scaled, zeros, length, Tensor.add_)
    elif scheme.implied_zero:
        scaled += scheme.implied_zero
    if scheme.scale_levels == "two":
        _clamp_to_int8(scaled, parameters, start, length)
    return nearest_codes(scaled, scheme)


def nearest_codes(scaled: Tensor, scheme: QuantScheme) -> Tensor:
    """The codes, uint8, nearest to numbers that are divided by their scales.

    Args:
        scaled: fp32 of any shape, with zero points, implied ones too, added; changed.
    """
    if scheme.weight.kind == "codebook":
        return _nearest(scaled, scheme.weight)
    if scheme.weight.kind == "float8":
        largest = scheme.weight.max_value
        assert scheme.weight.float_dtype is not None
        return scaled.clamp_(-largest, largest).to(scheme.weight.float_dtype).view(torch.uint8)
    return scaled.round_().clamp_(0, (1 << scheme.bits) - 1).to(torch.uint8)


def quantize(
    weight: Tensor,
    scheme: QuantScheme | str,
    *,
    perm: Tensor | None = None,
    activation_scale: Tensor | float | None = None,
    bias: Tensor | None = None,
) -> QuantizedWeight:
    """`weight` [N, K] rounded to nearest, as the hub's form, whose codes are held whole.

    Raises:
        SchemeError, WeightError: as `QuantScheme.parse` and `fit` do.
    """
    scheme = QuantScheme.parse(scheme)
    parameters = fit(weight, scheme, perm=perm, activation_scale=activation_scale)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start, stop in row_slices(*weight.shape):
        codes[start:stop] = encode_rows(weight[start:stop], parameters, start)
    return QuantizedWeight(scheme=scheme, codes=codes, bias=bias, **parameters.fields)


def _ranges(weight: Tensor, scheme: QuantScheme, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, 0 included: fp32 [N, G] each."""
    n, k = weight.shape
    length = scheme.group_length(k)
    # Both are made first and written slice by slice: small results that are allocated between a
    # slice's large temporaries and outlive them keep the allocator from giving those to the next
    # slice, up to the whole weight in fp32, twice.
    low = torch.empty(n, scheme.groups(k), dtype=torch.float32, device=weight.device)
    high = torch.empty_like(low)
    if perm is not None:
        perm = perm.to(weight.device)
    for start, stop in row_slices(n, k):
        rows = weight[start:stop]
        rows = (rows if perm is None else rows.index_select(1, perm)).float()
        if k % length:
            # Zeros change neither a minimum capped at 0 nor a maximum floored at 0.
            rows = F.pad(rows, (0, -k % length))
        grouped = rows.unflatten(1, (-1, length))
        torch.amin(grouped, dim=2, out=low[start:stop])
        torch.amax(grouped, dim=2, out=high[start:stop])
    return low.clamp_(max=0), high.clamp_(min=0)


def _step(low: Tensor, high: Tensor, scheme: QuantScheme) -> Tensor:
    """The scale that spreads the codes over [low, high]; 0 where the group is all zero."""
    if scheme.weight.kind != "linear":
        return torch.maximum(-low, high) / scheme.weight.max_value
    if scheme.symmetric:
        return torch.maximum(-low, high) / (((1 << scheme.bits) - 1) / 2)
    return (high - low) / ((1 << scheme.bits) - 1)


def least_scale(dtype: torch.dtype) -> float:
    """The smallest number above zero that a type of scales has."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _round_scales(scales: Tensor, scheme: QuantScheme) -> Tensor:
    rounded = scales.to(scheme.scale_dtype)
    if not rounded.isfinite().all():
        raise WeightError(
            f"a scale of {float(scales.max()):g} overflows {scheme.scale_dtype}: use scales of "
            f"another type, such as {scheme}-sfp32"
        )
    # A scale that rounds to zero would divide by zero; the smallest number keeps such a group at
    # (almost) zero, which it is.
    rounded.clamp_(min=least_scale(scheme.scale_dtype))
    if scheme.weight.values is not None and 0 not in scheme.weight.values:
        rounded.masked_fill_(scales == 0, 0)
    return rounded


def _mean_magnitudes(weight: Tensor, scheme: QuantScheme, perm: Tensor | None) -> Tensor:
    """Mean |w| of every group, fp32 [N, G], or [1, 1] per tensor.

    It is the scale that leaves the least squared error between w and scale * sign(w) (XNOR-Net,
    Rastegari et al. 2016, section 3.1).
    """
    n, k = weight.shape
    length, groups = scheme.group_length(k), scheme.groups(k)
    sums = torch.zeros(n, groups, dtype=torch.float32, device=weight.device)
    counts = torch.full((groups,), float(length), dtype=torch.float32, device=weight.device)
    counts[-1] = k - (groups - 1) * length
    for start, stop in row_slices(n, k):
        rows = weight[start:stop] if perm is None else weight[start:stop].index_select(1, perm)
        padded = F.pad(rows.float().abs(), (0, groups * length - k))
        torch.sum(padded.unflatten(1, (groups, length)), dim=2, out=sums[start:stop])
    if scheme.per_tensor:
        sums, counts = sums.sum(dim=0, keepdim=True), counts * n
    return sums / counts


def _two_level(low: Tensor, high: Tensor, scheme: QuantScheme) -> dict[str, Tensor | None]:
    """uint8 multipliers [N, G], zeros, fp32 channel scales [N] (QServe, Lin et al. 2024, 4.1).

    The channel scale is fitted so that the widest group takes the largest multiplier whose
    products still fit int8.
    """
    levels, most = (1 << scheme.bits) - 1, most_multiplier(scheme)
    width = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    channel = nonzero(width.amax(dim=1) / (levels * most))
    multipliers = (width / channel[:, None] / levels).round_().clamp_(1, most)
    zeros = None
    if not scheme.symmetric:
        steps = multipliers * channel[:, None]
        zeros = (-low / steps).round_().clamp_(0, levels).to(torch.uint8)
    scales = multipliers.to(torch.uint8)
    return {"scales": scales, "zeros": zeros, "channel_scales": channel}


def quantize_in_blocks(scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales and zero points, fp32 [N, G], in 4 bits each: the fields `scales`, `block_ranges`.

    16 rows of a group share the least and the step of both (SpQR, Dettmers et al. 2023, section 4).

    Args:
        dtype: of the steps.
    """
    scale_codes, scale_ranges = _in_blocks(scales, dtype)
    zero_codes, zero_ranges = _in_blocks(zeros, dtype)
    return {
        "scales": scale_codes | zero_codes << 4,
        "block_ranges": torch.cat([scale_ranges, zero_ranges], dim=2).to(dtype),
    }


def _in_blocks(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """uint8 codes [N, G] of 4 bits, and step and least fp32 [N / 16, G, 2] of blocks of rows."""
    largest = torch.finfo(dtype).max
    # What pads the last block has no range of its own.
    padding = numbers[-1:].expand(-len(numbers) % SCALE_BLOCK, -1)
    blocks = torch.cat([numbers, padding]).unflatten(0, (-1, SCALE_BLOCK))
    least = blocks.amin(dim=1).clamp(-largest, largest).to(dtype).float()
    step = ((blocks.amax(dim=1) - least) / 15).clamp(0, largest).to(dtype).float()
    codes = (blocks - least[:, None]) / nonzero(step)[:, None]
    codes = codes.round_().clamp_(0, 15).flatten(0, 1)[: len(numbers)]
    return codes.to(torch.uint8), torch.stack([step, least], dim=2)


def most_multiplier(scheme: QuantScheme) -> int:
    """The largest one of two-level scales whose products with codes span no more than int8."""
    return 128 >> (scheme.bits - 1) if scheme.symmetric else 255 // ((1 << scheme.bits) - 1)


def nonzero(scales: Tensor) -> Tensor:
    """Scales to divide by: 1 in place of 0."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _clamp_to_int8(codes: Tensor, parameters: WeightParameters, start: int, length: int) -> None:
    """Clamps codes, in place, so that multiplier * (code - zero) fits int8."""
    low, high = code_limits(parameters, start, start + codes.shape[0])
    apply_by_group(codes, high, length, Tensor.clamp_max_)
    apply_by_group(codes, low, length, Tensor.clamp_min_)


def code_limits(parameters: WeightParameters, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The least and the largest code of each group of rows [start, stop) of linear weights, fp32:
    with two-level scales, those whose multiplier * (code - zero) fits int8."""
    scheme = parameters.scheme
    scales = parameters.group_scales(start, stop)
    low, high = torch.zeros_like(scales), torch.full_like(scales, (1 << scheme.bits) - 1)
    if scheme.scale_levels == "two":
        multipliers = parameters.scales[start:stop].float()
        return product_limits(multipliers, parameters.group_zeros(start, stop), scheme)
    return low, high


def product_limits(
    multipliers: Tensor, zeros: Tensor | None, scheme: QuantScheme
) -> tuple[Tensor, Tensor]:
    """The least and the largest code whose multiplier * (code - zero) fits int8; all in fp32."""
    middle = scheme.implied_zero if zeros is None else zeros
    low = (middle - (128 / multipliers).floor()).clamp_(min=0)
    high = (middle + (127 / multipliers).floor()).clamp_(max=(1 << scheme.bits) - 1)
    return low, high


def _double_quantize(scales: Tensor) -> dict[str, Tensor | None]:
    """Scales as uint8 codes [N, G], with the fields of their second level (QLoRA, section 3)."""
    offset = scales.mean()
    centred = (scales - offset).flatten()
    blocks = F.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    table = nested_table(scales.device)
    scaled = (blocks / nonzero(absmax)[:, None]).flatten()[: centred.numel()]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return {
        "scales": codes.view(scales.shape),
        "nested_absmax": absmax,
        "nested_offset": offset,
    }


@once_a_device
def _boundaries(device: torch.device, weight: WeightType) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring values of a codebook, and the codes between them."""
    assert weight.values is not None
    first_code: dict[float, int] = {}
    for code, value in enumerate(weight.values):
        # Of equal values, 0 and -0 in FP4, the lower code is used.
        first_code.setdefault(value, code)
    values = sorted(first_code)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    codes = [first_code[value] for value in values]
    return (
        torch.tensor(middles, dtype=torch.float32, device=device),
        torch.tensor(codes, dtype=torch.uint8, device=device),
    )


def _nearest(scaled: Tensor, weight: WeightType) -> Tensor:
    middles, codes = _boundaries(scaled.device, weight)
    return codes[torch.bucketize(scaled, middles, out_int32=True)]
