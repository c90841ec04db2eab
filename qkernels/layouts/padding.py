"""Groups padded to a multiple of 16 columns, or of 32, for layouts whose kernels take no others.

Each group is padded at its end with columns whose x is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.lasting import once_a_device
from qkernels.scheme import QuantScheme

GROUP_MULTIPLE = 16


def kernel_group(scheme: QuantScheme, k: int, multiple: int = GROUP_MULTIPLE) -> int:
    """Columns of a group as the kernels see it: a multiple of `multiple`, or all of K."""
    length = scheme.group_length(k)
    return length if length >= k else -(-length // multiple) * multiple


def kernel_columns(scheme: QuantScheme, k: int, multiple: int = GROUP_MULTIPLE) -> int:
    """Columns of the weight as the kernels see it: `k`, and what pads its groups."""
    last = scheme.groups(k) - 1
    return last * kernel_group(scheme, k, multiple) + k - last * scheme.group_length(k)


def column_order(
    scheme: QuantScheme, k: int, device: torch.device, multiple: int = GROUP_MULTIPLE
) -> tuple[Tensor, Tensor] | None:
    """How padded groups map to columns, or None where no group is padded. Cached: do not write.

    Returns:
        source: int64 [kernel_columns]; the column each comes from, or k for padding.
        target: int64 [k]; where each column goes.
    """
    columns = kernel_columns(scheme, k, multiple)
    if columns == k:
        return None
    lengths = scheme.group_length(k), kernel_group(scheme, k, multiple)
    return _column_order(device, k, columns, *lengths)


@once_a_device
def _column_order(
    device: torch.device, k: int, padded_k: int, length: int, padded: int
) -> tuple[Tensor, Tensor]:
    columns = torch.arange(k, device=device)
    target = columns // length * padded + columns % length
    source = torch.full((padded_k,), k, device=device)
    source[target] = columns
    return source, target
