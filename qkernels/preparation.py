"""What happens to x before a kernel: its one home in Python, as csrc/bindings/preparation.h in C++.

x [..., K] is flattened to rows, multiplied by the input factor and put into the order of the codes,
and, for kernels whose layout pads groups, padded alike. Kernels quantize it themselves, or by
`reference.quantize_activations`.
"""

from __future__ import annotations

from torch import Tensor

from qkernels.fields import FIELDS
from qkernels.layouts import PackedWeight


def rows_of(x: Tensor, packed: PackedWeight) -> Tensor:
    """x [..., K] as the rows [M, K] that the codes of `packed` are multiplied with."""
    rows = x.reshape(-1, packed.k)
    for name, value in packed.buffers.items():
        transform = None if name == "words" else FIELDS[name].transform_x
        if transform is not None:
            rows = transform(rows, value)
    return rows
