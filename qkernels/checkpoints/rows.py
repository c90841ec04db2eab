"""Rows of quantized weights, put together to one weight where that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qkernels.fields import FIELDS, NESTED_BLOCK, SCALE_BLOCK, fields_of_rows
from qkernels.weight import QuantizedWeight


def pick(weight: QuantizedWeight, rows: slice | Tensor) -> QuantizedWeight:
    """Some rows of a weight, in any order: the same numbers.

    Args:
        rows: a slice with both ends, or int64 numbers of rows.
    """
    if isinstance(rows, slice):
        first = rows.start * weight.scheme.groups(weight.k)
        levels = weight.scheme.scale_levels
        cut = (levels == "double" and first % NESTED_BLOCK) or (
            levels == "blocks" and rows.start % SCALE_BLOCK
        )
        return (_one_level(weight) if cut else weight).rows(rows.start, rows.stop)
    weight = _one_level(weight)
    fields = {}
    for name, value in weight.fields.items():
        axis = _row_axis(weight, name)
        fields[name] = value if axis is None else value.index_select(axis, rows)
    fields |= fields_of_rows(weight.fields, rows)
    bias = None if weight.bias is None else weight.bias[rows]
    codes = weight.codes.index_select(0, rows)
    return QuantizedWeight(scheme=weight.scheme, codes=codes, bias=bias, **fields)


def as_slice(rows: Tensor, of: int | None) -> slice | Tensor | None:
    """Numbers of rows, at least one, in the shortest terms: None for all of `of` in their order."""
    start = int(rows[0])
    if not torch.equal(rows, torch.arange(start, start + len(rows))):
        return rows
    return None if len(rows) == of else slice(start, start + len(rows))


def join(weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """One weight with the rows of all, where some scheme holds them exactly; else `weights`.

    They are not one where columns are in different orders, inputs have different scales, or second
    levels of scales differ.
    """
    weights = list(weights)
    if len(weights) == 1:
        return weights
    if len({weight.scheme for weight in weights}) == 1 and weights[0].scheme.per_tensor:
        weights = _with_equal_scales(weights)
    first = weights[0]
    alike = all(
        weight.scheme == first.scheme
        and weight.k == first.k
        and weight.fields.keys() == first.fields.keys()
        and (weight.bias is None) == (first.bias is None)
        for weight in weights
    )
    if not alike:
        return weights
    fields = {}
    for name in first.fields:
        values = [weight.fields[name] for weight in weights]
        axis = _row_axis(first, name)
        if axis is None and not all(torch.equal(value, values[0]) for value in values):
            return weights
        if FIELDS[name].take_rows is not None:
            return weights
        if "row_blocks" in FIELDS[name].axes:
            if any(w.n % SCALE_BLOCK for w in weights[:-1]):
                return weights
            axis = 0
        if "nested_blocks" in FIELDS[name].axes:
            # All but the last must end with a block.
            if any(w.n * w.scheme.groups(w.k) % NESTED_BLOCK for w in weights[:-1]):
                return weights
            axis = 0
        if axis is not None and len({value.dtype for value in values}) > 1:
            return weights
        fields[name] = values[0] if axis is None else torch.cat(values, dim=axis)
    biases = [weight.bias for weight in weights if weight.bias is not None]
    if len({bias.dtype for bias in biases}) > 1:
        return weights
    return [
        QuantizedWeight(
            scheme=first.scheme,
            codes=torch.cat([weight.codes for weight in weights]),
            bias=torch.cat(biases) if biases else None,
            **fields,
        )
    ]


def _row_axis(weight: QuantizedWeight, name: str) -> int | None:
    """The dimension of a field that runs along the rows, or None."""
    axes = FIELDS[name].axes
    rows = "n" if weight.scheme.per_tensor or "rows" not in axes else "rows"
    return axes.index(rows) if rows in axes else None


def _one_level(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers with scales that are not quantized twice."""
    if weight.scheme.scale_levels not in ("double", "blocks"):
        return weight
    scheme = replace(weight.scheme, scale_levels="one", scale_dtype=torch.float32)
    second = dict.fromkeys(("nested_absmax", "nested_offset", "block_ranges"))
    numbers = {"scales": weight.group_scales(), "zeros": weight.group_zeros()}
    return weight.replace(scheme=scheme, **numbers, **second)


def _with_equal_scales(weights: list[QuantizedWeight]) -> list[QuantizedWeight]:
    """Weights with a scale each, as weights with a scale a row where the scales are different."""
    shared = ("scales", "zeros", "offsets")
    if all(
        torch.equal(weight.fields[name], weights[0].fields[name])
        for name in shared
        for weight in weights
        if name in weights[0].fields and name in weight.fields
    ):
        return weights
    scheme = replace(weights[0].scheme, per_tensor=False)
    return [
        weight.replace(
            scheme=scheme,
            **{
                name: weight.fields[name].expand(weight.n, 1).contiguous()
                for name in shared
                if name in weight.fields
            },
        )
        for weight in weights
    ]
