"""Groups padded to a multiple of 16 columns, for layouts whose kernels take no others.

Each group is padded at its end with columns of code 0, whose x is zero.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qkernels.scheme import QuantScheme

GROUP_MULTIPLE = 16


def kernel_group(scheme: QuantScheme, k: int) -> int:
    """Columns of a group as the kernels see it: a multiple of 16, or all of K."""
    length = scheme.group_length(k)
    return length if length >= k else -(-length // GROUP_MULTIPLE) * GROUP_MULTIPLE


def kernel_columns(scheme: QuantScheme, k: int) -> int:
    """Columns of the weight as the kernels see it: `k`, and what pads its groups."""
    last = scheme.groups(k) - 1
    return last * kernel_group(scheme, k) + k - last * scheme.group_length(k)


@lru_cache(maxsize=256)
def column_order(scheme: QuantScheme, k: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """How padded groups map to columns, or None where no group is padded. Cached: do not write.

    Returns:
        source: int64 [kernel_columns]; the column each comes from, or k for padding.
        target: int64 [k]; where each column goes.
    """
    if kernel_columns(scheme, k) == k:
        return None
    columns = torch.arange(k, device=device)
    length = scheme.group_length(k)
    target = columns // length * kernel_group(scheme, k) + columns % length
    source = torch.full((kernel_columns(scheme, k),), k, device=device)
    source[target] = columns
    return source, target
