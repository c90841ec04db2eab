"""The fields of a quantized weight beside its codes: a row for each.

Whatever carries weights (checks, devices, slices, layouts, state dicts, checkpoints, kernels, the
benchmark) goes through this table, so that a field is added here and where it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import sparse
from qkernels.errors import WeightError
from qkernels.scheme import QuantScheme

NESTED_BLOCK = 256
"""Scales that share one second-level scale in double quantization (QLoRA, section 3)."""

SCALE_BLOCK = 16
"""Rows whose scales and zero points of a group have steps in common (SpQR, section 4)."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

Values = Mapping[str, Tensor]
"""The fields that a weight has, by name."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A row of the table.

    Attributes:
        axes: what each dimension runs along: "n", "k", "groups", "rows" (n, or 1 where one scale
            serves the whole weight), "nested_blocks" (of 256 scales), "row_blocks" (of 16 rows),
            "ranges" (4); any other name is a length of its own, the same in all fields that name
            it. "positions" are there under schemes with scales per position alone.
        dtypes: the accepted types under a scheme.
        wanted: whether a scheme must have it (True), must not (False) or may (None).
        remedy: what to do where it is missing, for the message.
        by_group: layouts store it in an order of their own.
        check: (all values, the scheme, k) -> what is wrong with the field's value, or None.
        transform_x: (x [M, K], value) -> x as the codes are multiplied with; the fields of a weight
            apply in the order of the table.
        restore_rows: (weight rows [R, K] that go with the transformed x, value) -> rows that go
            with x itself; the transpose of `transform_x`.
        permutes_x: `transform_x` moves numbers of x and changes none.
        take_rows: (all values, rows int64 [R]) -> the fields of these rows that no axis leads to.
        take_columns: (all values, first column, last column) -> the fields of these columns that
            no axis leads to.
        add_to_rows: (rows fp32 [R, K] of the weight, in the order of the codes, first row, columns
            of a group, all values): adds, in place, what the weight has beyond its codes.
    """

    name: str
    axes: tuple[str, ...]
    dtypes: Callable[[QuantScheme], tuple[torch.dtype, ...]]
    wanted: Callable[[QuantScheme], bool | None]
    remedy: str = ""
    by_group: bool = False
    check: Callable[[Values, QuantScheme, int], str | None] | None = None
    transform_x: Callable[[Tensor, Tensor], Tensor] | None = None
    restore_rows: Callable[[Tensor, Tensor], Tensor] | None = None
    permutes_x: bool = False
    take_rows: Callable[[Values, Tensor], dict[str, Tensor]] | None = None
    take_columns: Callable[[Values, int, int], dict[str, Tensor]] | None = None
    add_to_rows: Callable[[Tensor, int, int, Values], None] | None = None

    def shape(self, scheme: QuantScheme, n: int, k: int) -> tuple[int | None, ...]:
        """The length of each of `dimensions`; None where it is the field's own."""
        rows, groups = (1 if scheme.per_tensor else n), scheme.groups(k)
        known = {
            "n": n,
            "k": k,
            "rows": rows,
            "groups": groups,
            "nested_blocks": -(-rows * groups // NESTED_BLOCK),
            "row_blocks": -(-n // SCALE_BLOCK),
            "ranges": 4,
        }
        return tuple(known.get(axis) for axis in self.dimensions(scheme))

    def dimensions(self, scheme: QuantScheme) -> tuple[str, ...]:
        """The axes that the field has under a scheme."""
        by_position = scheme.activation.by_position
        return tuple(axis for axis in self.axes if axis != "positions" or by_position)


def _scale_dtypes(scheme: QuantScheme) -> tuple[torch.dtype, ...]:
    return (scheme.scale_dtype if scheme.scale_levels == "one" else torch.uint8,)


def _zero_dtypes(scheme: QuantScheme) -> tuple[torch.dtype, ...]:
    return (torch.uint8,) if scheme.integer_activation else (torch.uint8, *_FLOATS)


def _own_scale_dtype(scheme: QuantScheme) -> tuple[torch.dtype, ...]:
    return (scheme.scale_dtype,)


def _only(*dtypes: torch.dtype) -> Callable[[QuantScheme], tuple[torch.dtype, ...]]:
    return lambda scheme: dtypes


def _with_levels(levels: str) -> Callable[[QuantScheme], bool]:
    return lambda scheme: scheme.scale_levels == levels


def _may(scheme: QuantScheme) -> None:
    return None


def _has_zeros(scheme: QuantScheme) -> bool:
    # In blocks they lie beside the scales.
    return not scheme.symmetric and scheme.scale_levels != "blocks"


def _may_have_offsets(scheme: QuantScheme) -> bool | None:
    integers = scheme.weight.kind == "linear" and _has_zeros(scheme)
    return None if integers and not scheme.integer_activation else False


def _check_perm(values: Values, scheme: QuantScheme, k: int) -> str | None:
    perm = values["perm"]
    if torch.equal(perm.sort().values, torch.arange(k, device=perm.device)):
        return None
    return f"must hold each of 0..{k - 1} once"


def _check_activation_scale(values: Values, scheme: QuantScheme, k: int) -> str | None:
    scales = values["activation_scale"]
    if not scales.numel():
        return "must hold a scale, got none"
    least = float(scales.min())
    return None if least > 0 else f"must be > 0, got {least}"


def _check_activation_zero(values: Values, scheme: QuantScheme, k: int) -> str | None:
    zeros, half = values["activation_zero"], 1 << (scheme.activation.bits - 1)
    wrong = zeros[(zeros < -half) | (zeros >= half)]
    return f"must be in {-half}..{half - 1}, got {int(wrong[0])}" if wrong.numel() else None


def _check_sparse(values: Values, scheme: QuantScheme, k: int) -> str | None:
    return sparse.check(values, k)


def _check_outliers(values: Values, scheme: QuantScheme, k: int) -> str | None:
    if "outlier_columns" not in values or "outlier_values" not in values:
        return "goes with the other one of outlier_columns and outlier_values"
    columns = values["outlier_columns"]
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= k):
        return f"must be in 0..{k - 1}, got {int(columns.min())} to {int(columns.max())}"
    return None if columns.unique().numel() == columns.numel() else "must name no column twice"


def _take_outlier_columns(values: Values, start: int, stop: int) -> dict[str, Tensor]:
    columns = values["outlier_columns"]
    kept = (columns >= start) & (columns < stop)
    return {
        "outlier_columns": columns[kept] - start,
        "outlier_values": values["outlier_values"][:, kept],
    }


def _permute(x: Tensor, perm: Tensor) -> Tensor:
    return x.index_select(1, perm)


def _permute_back(rows: Tensor, perm: Tensor) -> Tensor:
    out = torch.empty_like(rows)
    out[:, perm] = rows
    return out


def _scale_columns(x: Tensor, factor: Tensor) -> Tensor:
    return (x.float() * factor).to(x.dtype)


def _add_offsets(rows: Tensor, start: int, group: int, values: Values) -> None:
    offsets = values["offsets"]
    whole = offsets.shape[0] == 1
    own = (offsets if whole else offsets[start : start + rows.shape[0]]).to(rows.dtype)
    rows += own.repeat_interleave(group, dim=1)[:, : rows.shape[1]]


def _add_outliers(rows: Tensor, start: int, group: int, values: Values) -> None:
    outliers = values["outlier_values"][start : start + rows.shape[0]]
    rows.index_add_(1, values["outlier_columns"], outliers.to(rows.dtype))


FIELDS: dict[str, Field] = {
    row.name: row
    for row in (
        # What a code's value is multiplied by; multipliers or codes where scales have two levels.
        Field(
            name="scales",
            axes=("rows", "groups"),
            dtypes=_scale_dtypes,
            wanted=lambda scheme: True,
            by_group=True,
        ),
        # In units of codes.
        Field(
            name="zeros",
            axes=("rows", "groups"),
            dtypes=_zero_dtypes,
            wanted=_has_zeros,
            by_group=True,
        ),
        # In units of the weight: added to the numbers of a group after its scale, as where a format
        # has a least value in place of a zero point. Zero points go with it, 0 for none.
        Field(
            name="offsets",
            axes=("rows", "groups"),
            dtypes=_only(*_FLOATS),
            wanted=_may_have_offsets,
            by_group=True,
            add_to_rows=_add_offsets,
        ),
        # The second level of two-level scales.
        Field(
            name="channel_scales",
            axes=("n",),
            dtypes=_only(torch.float32),
            wanted=_with_levels("two"),
        ),
        # scale = table[code] * absmax[block] + offset, of doubly quantized scales. A block is 256
        # scales that follow each other row by row; the offset was taken off before quantizing.
        Field(
            name="nested_absmax",
            axes=("nested_blocks",),
            dtypes=_only(torch.float32),
            wanted=_with_levels("double"),
        ),
        Field(
            name="nested_offset",
            axes=(),
            dtypes=_only(torch.float32),
            wanted=_with_levels("double"),
        ),
        # Of scales and zero points that are quantized in blocks: for 16 rows of a group the step
        # and the least of the scales, and those of the zero points. A scale is step * (code & 15)
        # + least with its code in `scales`, a zero point the same of code >> 4.
        Field(
            name="block_ranges",
            axes=("row_blocks", "groups", "ranges"),
            dtypes=_own_scale_dtype,
            wanted=_with_levels("blocks"),
        ),
        # Multiplies the columns of x, where nothing before the layer could take it.
        Field(
            name="input_factor",
            axes=("k",),
            dtypes=_only(torch.float32),
            wanted=_may,
            transform_x=_scale_columns,
            restore_rows=torch.Tensor.mul,
        ),
        # Column j of the codes is column perm[j] of the weight.
        Field(
            name="perm",
            axes=("k",),
            dtypes=_only(torch.int64),
            wanted=_may,
            check=_check_perm,
            transform_x=_permute,
            restore_rows=_permute_back,
            permutes_x=True,
        ),
        # Columns of the codes that have 16-bit numbers added to what their codes say.
        Field(
            name="outlier_columns",
            axes=("outliers",),
            dtypes=_only(torch.int64),
            wanted=_may,
            check=_check_outliers,
            take_columns=_take_outlier_columns,
        ),
        Field(
            name="outlier_values",
            axes=("n", "outliers"),
            dtypes=_only(torch.float16, torch.bfloat16),
            wanted=_may,
            check=_check_outliers,
            add_to_rows=_add_outliers,
        ),
        # Single numbers of 16 bits that are added to what codes say: those of row n stand from
        # sparse_ends[n - 1] to sparse_ends[n], at columns of the codes.
        Field(
            name="sparse_ends",
            axes=("n",),
            dtypes=_only(torch.int32),
            wanted=_may,
            check=_check_sparse,
            take_rows=sparse.take_rows,
            take_columns=sparse.take_columns,
        ),
        Field(
            name="sparse_columns",
            axes=("entries",),
            dtypes=_only(torch.int16, torch.int32),
            wanted=_may,
            check=_check_sparse,
        ),
        Field(
            name="sparse_values",
            axes=("entries",),
            dtypes=_only(torch.float16, torch.bfloat16),
            wanted=_may,
            check=_check_sparse,
            add_to_rows=sparse.add_to_rows,
        ),
        # The scale of x, calibrated beforehand; that of the last position is for all behind it too.
        Field(
            name="activation_scale",
            axes=("positions",),
            dtypes=_only(torch.float32),
            wanted=lambda scheme: scheme.activation.is_static,
            remedy="pass calibration data or activation_scale, or use a scheme without -static "
            "or -position",
            check=_check_activation_scale,
        ),
        # The integer that stands for an x of zero, calibrated with the scale.
        Field(
            name="activation_zero",
            axes=("positions",),
            dtypes=_only(torch.int32),
            wanted=lambda scheme: scheme.activation.is_static and scheme.activation.has_zeros,
            remedy="pass calibration data, or use -static, -position or -tokenasym",
            check=_check_activation_zero,
        ),
    )
}
"""In the order in which buffers are listed and x is transformed."""


def has_positions(name: str) -> bool:
    """Whether a buffer of that name has a number for each position, where a scheme has scales per
    position."""
    return name in FIELDS and FIELDS[name].axes == ("positions",)


def optional_fields(scheme: QuantScheme, names: Iterable[str]) -> frozenset[str]:
    """Those of the fields `names` that a weight of `scheme` may have or not."""
    return frozenset(n for n in names if n in FIELDS and FIELDS[n].wanted(scheme) is None)


def check_fields(scheme: QuantScheme, n: int, k: int, values: Values) -> None:
    """Raises WeightError where a field is missing, not wanted, or has a wrong shape or value."""
    lengths: dict[str, int] = {}
    for field in FIELDS.values():
        value, wanted = values.get(field.name), field.wanted(scheme)
        if wanted is not None and wanted != (value is not None):
            takes, remedy = ("" if wanted else "no "), field.remedy and f": {field.remedy}"
            raise WeightError(
                f"scheme {scheme} takes {takes}{field.name}, got {field.name}={_brief(value)}"
                f"{remedy}"
            )
        if value is None:
            continue
        where = f"{field.name} of a {scheme} weight [{n}, {k}]"
        _check_tensor(where, field, value, scheme, n, k, lengths)
        if value.device != values["scales"].device:
            device = values["scales"].device
            raise WeightError(f"{where} is on {value.device}, the scales on {device}")
    for field in FIELDS.values():
        # On the meta device there are no values to check.
        if field.name in values and field.check is not None and not values[field.name].is_meta:
            wrong = field.check(values, scheme, k)
            if wrong is not None:
                raise WeightError(f"{field.name} {wrong}")


def _check_tensor(
    where: str,
    field: Field,
    value: Tensor,
    scheme: QuantScheme,
    n: int,
    k: int,
    lengths: dict[str, int],
) -> None:
    shape = field.shape(scheme, n, k)
    if len(shape) == value.dim():
        shape = tuple(
            lengths.setdefault(axis, size) if length is None else length
            for axis, length, size in zip(field.dimensions(scheme), shape, value.shape, strict=True)
        )
    if tuple(value.shape) != shape:
        named = zip(field.dimensions(scheme), shape, strict=True)
        wanted = ", ".join(axis if length is None else str(length) for axis, length in named)
        raise WeightError(f"{where} must have shape [{wanted}], got {list(value.shape)}")
    dtypes = field.dtypes(scheme)
    if value.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise WeightError(f"{where} must be {accepted}, got {value.dtype}")
    if value.is_floating_point() and not value.is_meta and not value.isfinite().all():
        raise WeightError(f"{where} holds NaN or infinity")


def _brief(value: Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} {list(value.shape)}"


def cut_rows(
    scheme: QuantScheme, n: int, k: int, values: Values, start: int, stop: int
) -> dict[str, Tensor]:
    """The fields of rows [start, stop) of a weight [n, k]; they share memory with `values`.

    Raises:
        WeightError: where doubly quantized scales are cut inside a block of 256.
    """
    out = {}
    for name, value in values.items():
        for dim, axis in enumerate(FIELDS[name].axes):
            if axis == "n" or (axis == "rows" and not scheme.per_tensor):
                value = value.narrow(dim, start, stop - start)
            elif axis == "nested_blocks":
                first = start * scheme.groups(k)
                if first % NESTED_BLOCK:
                    raise WeightError(
                        f"rows cannot be cut before row {start}: doubly quantized scales come in "
                        f"blocks of {NESTED_BLOCK}, and {first} of them lie before it"
                    )
                last = -(-stop * scheme.groups(k) // NESTED_BLOCK)
                value = value[first // NESTED_BLOCK : last]
            elif axis == "row_blocks":
                if start % SCALE_BLOCK:
                    raise WeightError(
                        f"rows cannot be cut before row {start}: the scales of {SCALE_BLOCK} rows "
                        "are quantized together"
                    )
                value = value[start // SCALE_BLOCK : -(-stop // SCALE_BLOCK)]
        out[name] = value
    rows = torch.arange(start, stop, device=values["scales"].device)
    return out | fields_of_rows(values, rows)


def fields_of_rows(values: Values, rows: Tensor) -> dict[str, Tensor]:
    """Those fields of the rows with the numbers `rows`, int64 [R], that no axis leads to."""
    out: dict[str, Tensor] = {}
    for name in values:
        take = FIELDS[name].take_rows
        if take is not None:
            out |= take(values, rows)
    return out


def cut_columns(
    scheme: QuantScheme, n: int, k: int, values: Values, start: int, stop: int
) -> dict[str, Tensor]:
    """The fields of columns [start, stop) of a weight [n, k].

    Raises:
        WeightError: for columns that do not begin and end with groups, a weight in another column
            order, or doubly quantized scales.
    """
    length, groups = scheme.group_length(k), scheme.groups(k)
    if groups > 1 and (start % length or (stop % length and stop != k)):
        raise WeightError(
            f"columns {start} to {stop} do not begin and end with groups of {length}: cut at "
            "multiples of that"
        )
    first, last = (start // length, -(-stop // length)) if groups > 1 else (0, 1)
    if "perm" in values or ("nested_absmax" in values and (first, last) != (0, groups)):
        what = "in activation order" if "perm" in values else "with doubly quantized scales"
        raise WeightError(f"columns of a weight {what} cannot be cut: dequantize it first")
    out = {}
    for name, value in values.items():
        for dim, axis in enumerate(FIELDS[name].axes):
            if axis == "groups":
                value = value.narrow(dim, first, last - first)
            elif axis == "k":
                value = value.narrow(dim, start, stop - start)
        out[name] = value
    for name in values:
        take = FIELDS[name].take_columns
        if take is not None:
            out |= take(values, start, stop)
    return out
