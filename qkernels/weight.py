"""The hub: `QuantizedWeight`, logical codes with their scales, zero points and column order.

    W[n, k] = scale[n, g] * (value(code[n, k]) - zero[n, g])

with `value` the code itself (asymmetric), the code less half the range (symmetric), a codebook
entry or a float8 number. Every checkpoint format and every kernel layout converts to and from this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch
from torch import Tensor

from qkernels.errors import WeightError
from qkernels.scheme import QuantScheme, WeightType

NESTED_BLOCK = 256
"""Scales that share one second-level scale in double quantization (QLoRA, section 3)."""

SLICE_ELEMENTS = 1 << 22
"""Weight elements worked on at a time, which bounds the memory of conversions: 16 MiB of fp32."""


def row_slices(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover [0, n) and hold about `SLICE_ELEMENTS` elements each.

    Starts are multiples of 256, so that a slice never splits a block of nested scales.
    """
    rows = max(NESTED_BLOCK, SLICE_ELEMENTS // max(k, 1) // NESTED_BLOCK * NESTED_BLOCK)
    for start in range(0, n, rows):
        yield start, min(n, start + rows)


@lru_cache(maxsize=64)
def _codebook(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def codebook(weight_type: WeightType, device: torch.device | str = "cpu") -> Tensor:
    """The values of a codebook type, fp32 [16]. Cached: do not write to it."""
    assert weight_type.values is not None, f"{weight_type.name} has no codebook"
    return _codebook(weight_type.values, torch.device(device))


@lru_cache(maxsize=8)
def nested_table(device: torch.device) -> Tensor:
    """The 256 values of 8-bit double-quantized scales, fp32, ascending (bitsandbytes' dynamic map).

    For i = 0..6 the midpoints of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs,
    and 0 and 1 (Dettmers et al. 2022, 8-bit Optimizers, section 2.1). Cached: do not write to it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True, eq=False)
class NestedScales:
    """The second level of double-quantized scales: scale = table[code] * absmax[block] + offset.

    Attributes:
        absmax: fp32 [ceil(N*G / 256)], one for each 256 consecutive scales in row-major order.
        offset: fp32 [], the mean that was taken off before quantizing.
    """

    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightParameters:
    """All of a quantized weight but its codes: small next to them, so held whole.

    Shapes, with G = scheme.groups(K):
        scales: [N, G] floating; [1, 1] per tensor; uint8 multipliers (two-level scales) or uint8
            codes (double-quantized scales).
        zeros: [N, G], uint8 (integer zero points) or floating (real ones), in code units; [1, 1]
            per tensor; None where the scheme is symmetric.
        channel_scales: fp32 [N], with two-level scales only.
        nested: with double-quantized scales only.
        perm: int64 [K] or None; column j of the codes is column perm[j] of the weight.
        activation_scale: fp32 [], with static activations only.
    """

    scheme: QuantScheme
    n: int
    k: int
    scales: Tensor
    zeros: Tensor | None = None
    channel_scales: Tensor | None = None
    nested: NestedScales | None = None
    perm: Tensor | None = None
    activation_scale: Tensor | None = None

    def group_scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What a code's value is multiplied by, for rows [start, stop): fp32 [rows, G]."""
        stop = self.n if stop is None else stop
        if self.scheme.per_tensor:
            return self.scales.float().expand(stop - start, 1)
        scales = self.scales[start:stop]
        if self.scheme.scale_levels == "double":
            assert self.nested is not None
            groups = self.scales.shape[1]
            index = torch.arange(start * groups, stop * groups, device=scales.device)
            block_max = self.nested.absmax[index // NESTED_BLOCK].view(stop - start, groups)
            table = nested_table(scales.device)
            return table[scales.int()] * block_max + self.nested.offset
        if self.scheme.scale_levels == "two":
            assert self.channel_scales is not None
            return scales.float() * self.channel_scales[start:stop, None]
        return scales.float()

    def group_zeros(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Zero points of rows [start, stop) in code units: fp32 [rows, G], or None."""
        if self.zeros is None:
            return None
        stop = self.n if stop is None else stop
        if self.scheme.per_tensor:
            return self.zeros.float().expand(stop - start, 1)
        return self.zeros[start:stop].float()

    def dequantize_rows(self, codes: Tensor, start: int) -> Tensor:
        """Rows of the weight from `start` on for uint8 `codes` [rows, K], in the codes' order.

        Returns fp32 [rows, K].
        """
        stop = start + codes.shape[0]
        values = code_values(self.scheme, codes)
        zeros = self.group_zeros(start, stop)
        if zeros is not None:
            apply_by_group(values, zeros, self.scheme.group_length(self.k), torch.Tensor.sub_)
        scales = self.group_scales(start, stop)
        apply_by_group(values, scales, self.scheme.group_length(self.k), torch.Tensor.mul_)
        return values

    def to_column_order(self, rows: Tensor) -> Tensor:
        """`rows` [.., K] in the codes' column order, put into the weight's own column order."""
        if self.perm is None:
            return rows
        out = torch.empty_like(rows)
        out[:, self.perm] = rows
        return out


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedWeight(WeightParameters):
    """A quantized weight [N, K]: uint8 `codes` [N, K] and their parameters, plus a bias.

    Construction checks shapes, dtypes and ranges, so that whatever is built from a
    `QuantizedWeight` needs no checks of its own. `n` and `k` are taken from `codes`.

    Raises:
        WeightError: naming the tensor, its value and what is accepted.
    """

    n: int = field(init=False)
    k: int = field(init=False)
    codes: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise WeightError(f"codes must be [N, K], got shape {tuple(self.codes.shape)}")
        object.__setattr__(self, "n", self.codes.shape[0])
        object.__setattr__(self, "k", self.codes.shape[1])
        check_parameters(self)
        _check_codes(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def parameters(self) -> WeightParameters:
        """The same weight without codes and bias."""
        named = {f.name: getattr(self, f.name) for f in fields(WeightParameters)}
        return WeightParameters(**named)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K], in its own column order."""
        out = torch.empty(self.n, self.k, dtype=torch.float32, device=self.codes.device)
        for start, stop in row_slices(self.n, self.k):
            rows = self.dequantize_rows(self.codes[start:stop], start)
            out[start:stop] = self.to_column_order(rows)
        return out

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with every tensor on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        nested = self.nested
        if nested is not None:
            nested = NestedScales(nested.absmax.to(device), nested.offset.to(device))
        return QuantizedWeight(
            scheme=self.scheme,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=move(self.zeros),
            channel_scales=move(self.channel_scales),
            nested=nested,
            perm=move(self.perm),
            activation_scale=move(self.activation_scale),
            bias=move(self.bias),
        )


def code_values(scheme: QuantScheme, codes: Tensor) -> Tensor:
    """The values that uint8 `codes` stand for, before scale and zero point: fp32, same shape."""
    weight = scheme.weight
    if weight.kind == "codebook":
        return codebook(weight, codes.device)[codes.int()]
    if weight.kind == "float8":
        assert weight.float_dtype is not None
        return codes.contiguous().view(weight.float_dtype).float()
    values = codes.float()
    return values.sub_(scheme.zero_offset) if scheme.zero_offset else values


def apply_by_group(
    values: Tensor,
    per_group: Tensor,
    group_length: int,
    inplace: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """`inplace(values[:, columns of g], per_group[:, g])` for every group; the last may be short.

    Args:
        values: [rows, K], changed in place.
        per_group: [rows, G].
        inplace: a tensor method such as `torch.Tensor.mul_`.
    """
    k = values.shape[1]
    whole = k // group_length
    if whole:
        grouped = values[:, : whole * group_length].unflatten(1, (whole, group_length))
        inplace(grouped, per_group[:, :whole, None])
    if whole * group_length < k:
        inplace(values[:, whole * group_length :], per_group[:, whole:])


def check_parameters(weight: WeightParameters) -> None:
    """Raises WeightError where a parameter's shape, dtype, device or value is off."""
    scheme, n, k = weight.scheme, weight.n, weight.k
    shape = (1, 1) if scheme.per_tensor else (n, scheme.groups(k))
    scale_dtype = scheme.scale_dtype if scheme.scale_levels == "one" else torch.uint8
    _expect(weight, "scales", weight.scales, shape, (scale_dtype,))
    if scheme.symmetric != (weight.zeros is None):
        wanted = "no zeros" if scheme.symmetric else "zeros"
        raise WeightError(f"scheme {scheme} takes {wanted}, got zeros={_brief(weight.zeros)}")
    if weight.zeros is not None:
        kinds = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
        _expect(weight, "zeros", weight.zeros, shape, kinds)
        if scheme.integer_activation and weight.zeros.dtype != torch.uint8:
            raise WeightError(f"scheme {scheme} needs integer zeros, got {_brief(weight.zeros)}")
    if (scheme.scale_levels == "two") != (weight.channel_scales is not None):
        raise WeightError(
            f"channel_scales go with two-level scales alone; scheme {scheme} has "
            f"{scheme.scale_levels}-level scales, got {_brief(weight.channel_scales)}"
        )
    if weight.channel_scales is not None:
        _expect(weight, "channel_scales", weight.channel_scales, (n,), (torch.float32,))
    if (scheme.scale_levels == "double") != (weight.nested is not None):
        raise WeightError(f"nested scales go with -dq schemes alone, not with {scheme}")
    if weight.nested is not None:
        blocks = -(-weight.scales.numel() // NESTED_BLOCK)
        _expect(weight, "nested.absmax", weight.nested.absmax, (blocks,), (torch.float32,))
        _expect(weight, "nested.offset", weight.nested.offset, (), (torch.float32,))
    if weight.perm is not None:
        _expect(weight, "perm", weight.perm, (k,), (torch.int64,))
        if not torch.equal(weight.perm.sort().values, torch.arange(k, device=weight.perm.device)):
            raise WeightError(f"perm must hold each of 0..{k - 1} once")
    is_static = scheme.activation.granularity == "static"
    if is_static != (weight.activation_scale is not None):
        remedy = (
            "pass calibration data or activation_scale"
            if is_static
            else "leave it out, or use a scheme that ends in -static"
        )
        raise WeightError(
            f"scheme {scheme}: activation_scale is {_brief(weight.activation_scale)}: {remedy}"
        )
    if weight.activation_scale is not None:
        _expect(weight, "activation_scale", weight.activation_scale, (), (torch.float32,))
        if not float(weight.activation_scale) > 0:
            raise WeightError(f"activation_scale must be > 0, got {float(weight.activation_scale)}")


def _check_codes(weight: QuantizedWeight) -> None:
    _expect(weight, "codes", weight.codes, weight.shape, (torch.uint8,))
    if weight.bias is not None:
        floats = (torch.float16, torch.bfloat16, torch.float32)
        _expect(weight, "bias", weight.bias, (weight.n,), floats)
    scheme = weight.scheme
    for start, stop in row_slices(weight.n, weight.k):
        codes = weight.codes[start:stop]
        if scheme.bits < 8 and codes.numel() and int(codes.max()) >= 1 << scheme.bits:
            raise WeightError(
                f"codes of scheme {scheme} must be below {1 << scheme.bits}, got {int(codes.max())}"
            )
        if scheme.weight.kind == "float8" and not code_values(scheme, codes).isfinite().all():
            raise WeightError(f"codes hold NaN or infinity as {scheme.weight.name} numbers")
        if scheme.scale_levels == "two":
            integers = integer_rows(weight, codes, start)
            if integers.numel() and (int(integers.min()) < -128 or int(integers.max()) > 127):
                raise WeightError(
                    "two-level scales: multiplier * (code - zero) must fit int8, got the range "
                    f"[{int(integers.min())}, {int(integers.max())}]"
                )


def integer_rows(weight: WeightParameters, codes: Tensor, start: int) -> Tensor:
    """The integers an int8 product takes for uint8 `codes` [rows, K]: int16, in code order.

    multiplier[n, g] * (code - zero[n, g]), where the multiplier is 1 but for two-level scales.
    """
    stop, length = start + codes.shape[0], weight.scheme.group_length(weight.k)
    values = codes.short()
    if weight.zeros is None:
        values -= weight.scheme.zero_offset
    else:
        zeros = weight.zeros if weight.scheme.per_tensor else weight.zeros[start:stop]
        apply_by_group(values, zeros.short().expand(codes.shape[0], -1), length, Tensor.sub_)
    if weight.scheme.scale_levels == "two":
        apply_by_group(values, weight.scales[start:stop].short(), length, Tensor.mul_)
    return values


def _expect(
    weight: WeightParameters,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    where = f"{name} of a {weight.scheme} weight [{weight.n}, {weight.k}]"
    if tuple(tensor.shape) != shape:
        raise WeightError(f"{where} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise WeightError(f"{where} must be {accepted}, got {tensor.dtype}")
    if tensor.device != weight.scales.device:
        raise WeightError(f"{where} is on {tensor.device}, the scales on {weight.scales.device}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise WeightError(f"{where} holds NaN or infinity")


def _brief(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
