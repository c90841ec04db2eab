"""Blocks of a weight that follow each other row by row, and may begin and end within rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_group(k: int, block: int) -> int | None:
    """The largest group size that splits every block of `block` columns at the ends of rows.

    It is `block` itself where that divides K, else what both are multiples of; None is one group a
    row, as in a scheme.
    """
    if k % block == 0:
        return block
    size = math.gcd(k, block)
    return None if size == k else size


def block_of_groups(n: int, k: int, block: int) -> Tensor:
    """The block that each group of `block_group` lies in: int64 [N, G]."""
    size = block_group(k, block) or k
    groups = k // size
    return (torch.arange(n * groups) * size // block).view(n, groups)
