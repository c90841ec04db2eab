"""The hub: `QuantizedWeight`, logical codes with their scales, zero points and column order.

    W[n, k] = scale[n, g] * (value(code[n, k]) - zero[n, g])

with `value` the code itself (asymmetric), the code less half the range (symmetric), a codebook
entry or a float8 number. Every checkpoint format and every kernel layout converts to and from this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkernels.errors import WeightError
from qkernels.fields import (
    FIELDS,
    NESTED_BLOCK,
    SCALE_BLOCK,
    check_fields,
    cut_columns,
    cut_rows,
)
from qkernels.lasting import once_a_device
from qkernels.scheme import QuantScheme, WeightType

SLICE_ELEMENTS = 1 << 22
"""Weight elements worked on at a time, which bounds the memory of conversions: 16 MiB of fp32."""


def row_slices(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover [0, n) and hold about `SLICE_ELEMENTS` elements each.

    Starts are multiples of 256, so that a slice never splits a block of nested scales.
    """
    rows = max(NESTED_BLOCK, SLICE_ELEMENTS // max(k, 1) // NESTED_BLOCK * NESTED_BLOCK)
    for start in range(0, n, rows):
        yield start, min(n, start + rows)


@once_a_device
def _codebook(device: torch.device, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def codebook(
    weight_type: WeightType, device: torch.device | str = "cpu", entries: int = 0
) -> Tensor:
    """The values of a codebook type, fp32 [2^bits], with zeros up to `entries` of them.

    Cached: do not write to it.
    """
    assert weight_type.values is not None, f"{weight_type.name} has no codebook"
    padding = (0.0,) * (entries - len(weight_type.values))
    return _codebook(device, (*weight_type.values, *padding))


@once_a_device
def nested_table(device: torch.device) -> Tensor:
    """The 256 values of 8-bit double-quantized scales, fp32, ascending (bitsandbytes' dynamic map).

    For i = 0..6 the midpoints of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs,
    and 0 and 1 (Dettmers et al. 2022, 8-bit Optimizers, section 2.1). Cached: do not write to it.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def nested_scales(codes: Tensor, rows: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """Doubly quantized scales of the rows with the numbers `rows`: fp32 [R, G].

    Args:
        codes: uint8 [R, G], of these rows.
        rows: int64 [R].
        absmax, offset: of the whole weight; see `WeightParameters`.
    """
    groups = codes.shape[1]
    index = rows[:, None] * groups + torch.arange(groups, device=codes.device)
    return nested_table(codes.device)[codes.int()] * absmax[index // NESTED_BLOCK] + offset


def block_numbers(codes: Tensor, rows: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points, fp32 [R, G], that are quantized in blocks, of the rows `rows`.

    Args:
        codes: uint8 [R, G], of these rows.
        rows: int64 [R].
        ranges: `block_ranges` of the whole weight.
    """
    own = ranges.float()[rows // SCALE_BLOCK]
    step, least, zero_step, least_zero = own.unbind(dim=2)
    scales = (codes & 15).float().mul_(step).add_(least)
    return scales, (codes >> 4).float().mul_(zero_step).add_(least_zero)


@dataclass(frozen=True, eq=False, init=False)
class WeightParameters:
    """All of a quantized weight [n, k] but its codes: small next to them, so held whole.

    The fields, rows of `fields.FIELDS`, are attributes too; one that is not there is None. Shapes,
    with G = scheme.groups(K):
        scales: [N, G] floating; [1, 1] per tensor; uint8 multipliers (two-level scales) or uint8
            codes (double-quantized scales; in blocks, those of zero points above them).
        zeros: [N, G], uint8 (integer zero points) or floating (real ones), in code units; [1, 1]
            per tensor; None where the scheme is symmetric, or has scales in blocks.
        channel_scales: fp32 [N], with two-level scales only.
        block_ranges: [ceil(N / 16), G, 4], of the type of scales, with scales in blocks.
        nested_absmax, nested_offset: fp32 [ceil(N*G / 256)] and [], with double-quantized scales.
        input_factor: fp32 [K] or None; multiplies the columns of x.
        perm: int64 [K] or None; column j of the codes is column perm[j] of the weight.
        outlier_columns, outlier_values: int64 [C] and 16-bit [N, C], or None; added to columns of
            the codes.
        sparse_ends, sparse_columns, sparse_values: int32 [N], int16 or int32 [S] and 16-bit [S], or
            None; added to single codes. See `sparse`.
        activation_scale: fp32 [], with static activations only; [P] where each position has one.
        activation_zero: int32 of the same shape, with static activations that have zero points.
    """

    scheme: QuantScheme
    n: int
    k: int
    fields: Mapping[str, Tensor]

    if TYPE_CHECKING:
        scales: Tensor
        zeros: Tensor | None
        channel_scales: Tensor | None
        nested_absmax: Tensor | None
        nested_offset: Tensor | None
        block_ranges: Tensor | None
        input_factor: Tensor | None
        perm: Tensor | None
        outlier_columns: Tensor | None
        outlier_values: Tensor | None
        sparse_ends: Tensor | None
        sparse_columns: Tensor | None
        sparse_values: Tensor | None
        activation_scale: Tensor | None
        activation_zero: Tensor | None

    def __init__(self, *, scheme: QuantScheme, n: int, k: int, **fields: Tensor | None) -> None:
        unknown = [name for name in fields if name not in FIELDS]
        if unknown:
            raise TypeError(f"a weight has no field {unknown[0]!r}: they are {', '.join(FIELDS)}")
        present = {name: value for name in FIELDS if (value := fields.get(name)) is not None}
        own = {"scheme": scheme, "n": n, "k": k, "fields": present}
        for name, part in own.items():
            object.__setattr__(self, name, part)

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            return self.__dict__["fields"].get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def replace(self, **changes: Any) -> WeightParameters:
        """The same with another scheme or other fields; None takes a field away."""
        return WeightParameters(
            **{"scheme": self.scheme, "n": self.n, "k": self.k, **self.fields, **changes}
        )

    def group_scales(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What a code's value is multiplied by, for rows [start, stop): fp32 [rows, G]."""
        stop = self.n if stop is None else stop
        if self.scheme.per_tensor:
            return self.scales.float().expand(stop - start, 1)
        scales = self.scales[start:stop]
        if self.scheme.scale_levels == "double":
            assert self.nested_absmax is not None and self.nested_offset is not None
            rows = torch.arange(start, stop, device=scales.device)
            return nested_scales(scales, rows, self.nested_absmax, self.nested_offset)
        if self.scheme.scale_levels == "two":
            assert self.channel_scales is not None
            return scales.float() * self.channel_scales[start:stop, None]
        if self.scheme.scale_levels == "blocks":
            return self._block_numbers(start, stop)[0]
        return scales.float()

    def _block_numbers(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.block_ranges is not None
        rows = torch.arange(start, stop, device=self.scales.device)
        return block_numbers(self.scales[start:stop], rows, self.block_ranges)

    def group_zeros(self, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Zero points of rows [start, stop) in code units: fp32 [rows, G], or None."""
        stop = self.n if stop is None else stop
        if self.scheme.scale_levels == "blocks":
            return self._block_numbers(start, stop)[1]
        if self.zeros is None:
            return None
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
        self._add_to_rows(values, start)
        return values

    def beyond_codes(self, start: int, stop: int) -> Tensor | None:
        """What rows [start, stop) have beyond their codes, fp32 in the codes' order, or None."""
        if all(FIELDS[name].add_to_rows is None for name in self.fields):
            return None
        rows = torch.zeros(stop - start, self.k, dtype=torch.float32, device=self.scales.device)
        self._add_to_rows(rows, start)
        return rows

    def _add_to_rows(self, rows: Tensor, start: int) -> None:
        for name in self.fields:
            add = FIELDS[name].add_to_rows
            if add is not None:
                add(rows, start, self.scheme.group_length(self.k), self.fields)

    def to_column_order(self, rows: Tensor) -> Tensor:
        """Weight rows [.., K] as the codes have them, as they multiply x itself.

        Columns go from the codes' order into the weight's own, and take the input factor.
        """
        for name in reversed(list(self.fields)):
            restore = FIELDS[name].restore_rows
            if restore is not None:
                rows = restore(rows, self.fields[name])
        return rows


@dataclass(frozen=True, eq=False, init=False)
class QuantizedWeight(WeightParameters):
    """A quantized weight [N, K]: uint8 `codes` [N, K] and their parameters, plus a bias.

    Construction checks shapes, dtypes and ranges, so that whatever is built from a
    `QuantizedWeight` needs no checks of its own. `n` and `k` are taken from `codes`.

    Raises:
        WeightError: naming the tensor, its value and what is accepted.
    """

    codes: Tensor
    bias: Tensor | None

    def __init__(
        self,
        *,
        scheme: QuantScheme,
        codes: Tensor,
        bias: Tensor | None = None,
        **fields: Tensor | None,
    ) -> None:
        if codes.dim() != 2:
            raise WeightError(f"codes must be [N, K], got shape {tuple(codes.shape)}")
        super().__init__(scheme=scheme, n=codes.shape[0], k=codes.shape[1], **fields)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "bias", bias)
        check_parameters(self)
        _check_codes(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def parameters(self) -> WeightParameters:
        """The same weight without codes and bias."""
        return WeightParameters(scheme=self.scheme, n=self.n, k=self.k, **self.fields)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K], in its own column order: what x itself is multiplied by."""
        out = torch.empty(self.n, self.k, dtype=torch.float32, device=self.codes.device)
        for start, stop in row_slices(self.n, self.k):
            rows = self.dequantize_rows(self.codes[start:stop], start)
            out[start:stop] = self.to_column_order(rows)
        return out

    def replace(self, **changes: Any) -> QuantizedWeight:
        """The same weight with other codes, bias, scheme or fields; None takes a field away."""
        parts = {"scheme": self.scheme, "codes": self.codes, "bias": self.bias, **self.fields}
        return QuantizedWeight(**{**parts, **changes})

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with every tensor on `device`."""
        return self.replace(
            codes=self.codes.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            **{name: value.to(device) for name, value in self.fields.items()},
        )

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Rows [start, stop), such as a shard of the outputs; shares memory with this weight.

        Raises:
            WeightError: for rows out of range, or where a field cannot be cut there.
        """
        _check_range("rows", start, stop, self.n)
        fields = cut_rows(self.scheme, self.n, self.k, self.fields, start, stop)
        bias = None if self.bias is None else self.bias[start:stop]
        return QuantizedWeight(
            scheme=self.scheme, codes=self.codes[start:stop], bias=bias, **fields
        )

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """Columns [start, stop), such as a shard of the inputs; without the bias, which is added
        once for all shards.

        Raises:
            WeightError: for columns out of range, or that do not begin and end with groups.
        """
        _check_range("columns", start, stop, self.k)
        fields = cut_columns(self.scheme, self.n, self.k, self.fields, start, stop)
        return QuantizedWeight(scheme=self.scheme, codes=self.codes[:, start:stop], **fields)


def _check_range(what: str, start: int, stop: int, size: int) -> None:
    if not 0 <= start < stop <= size:
        raise WeightError(f"{what} {start} to {stop} are not in 0 to {size}")


def code_values(scheme: QuantScheme, codes: Tensor) -> Tensor:
    """The values that uint8 `codes` stand for, before scale and zero point: fp32, same shape."""
    weight = scheme.weight
    if weight.kind == "codebook":
        return codebook(weight, codes.device)[codes.int()]
    if weight.kind == "float8":
        assert weight.float_dtype is not None
        return codes.contiguous().view(weight.float_dtype).float()
    values = codes.float()
    return values.sub_(scheme.implied_zero) if scheme.implied_zero else values


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
    """Raises WeightError where a field is missing, or its shape, dtype, device or value is off."""
    check_fields(weight.scheme, weight.n, weight.k, weight.fields)


def _check_codes(weight: QuantizedWeight) -> None:
    floats = (torch.float16, torch.bfloat16, torch.float32)
    _expect(weight, "codes", weight.codes, weight.shape, (torch.uint8,))
    if weight.bias is not None:
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
        values -= weight.scheme.implied_zero
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
