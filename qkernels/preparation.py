"""What happens to x before a kernel: its one home in Python, as csrc/bindings/preparation.h in C++.

x [..., K] is flattened to rows, multiplied by the input factor and put into the order of the codes,
and, for kernels whose layout pads groups, padded alike. Kernels quantize it themselves, or by
`quantize_activations` of backends/rows.py. Flattened rows have lost their positions: where these
have scales, each row is given its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from qkernels import positions
from qkernels.fields import FIELDS, has_positions
from qkernels.layouts import PackedWeight


def rows_of(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [..., K] as the rows [M, K] that the codes of `packed` are multiplied with."""
    rows = x.reshape(-1, packed.k)
    for name, value in packed.buffers.items():
        transform = None if name == "words" else FIELDS[name].transform_x
        if transform is not None:
            rows = transform(rows, value)
    return rows


def restore_columns(rows: Tensor, packed: PackedWeight) -> Tensor:
    """[M, K] that go with x as the codes of `packed` are multiplied with it, such as its gradient,
    as they go with x itself: the transpose of `rows_of`."""
    for name, value in reversed(packed.buffers.items()):
        restore = None if name == "words" else FIELDS[name].restore_rows
        if restore is not None:
            rows = restore(rows, value)
    return rows


def with_row_scales(packed: PackedWeight, shape: Sequence[int]) -> PackedWeight:
    """`packed` as the rows of x [*shape] are multiplied with it: of static activations per
    position, with the scale, and the zero point, of each row."""
    if not packed.scheme.activation.by_position:
        return packed
    return with_scales_at(packed, positions.of_rows(shape, packed.device))


def with_scales_at(packed: PackedWeight, places: Tensor) -> PackedWeight:
    """`packed`, with activations per position, as rows at the positions int64 [M] are multiplied
    with it."""
    own = {
        name: positions.at(value, places)
        for name, value in packed.buffers.items()
        if has_positions(name)
    }
    return replace(packed, buffers=packed.buffers | own)
