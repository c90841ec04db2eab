"""Single numbers that a weight has beside its codes, row by row: the fields `sparse_ends`,
`sparse_columns` and `sparse_values`.

The entries of row n stand from ends[n - 1], or 0, to ends[n].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = ("sparse_ends", "sparse_columns", "sparse_values")

_AT_ONCE = 1 << 22
"""Products that are held before they are added up: 16 MiB of fp32."""

_Values = Mapping[str, Tensor]


def fields_of(
    numbers: Tensor, mask: Tensor, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """The fields of the entries of `numbers` [N, K] where `mask` is true; none where it never is.

    Args:
        dtype: fp16 or bf16, to which numbers are rounded; they saturate.
    """
    rows, columns = mask.nonzero(as_tuple=True)
    if not len(rows):
        return {}
    largest = torch.finfo(dtype).max
    short = numbers.shape[1] <= torch.iinfo(torch.int16).max + 1
    return {
        "sparse_ends": mask.sum(dim=1).cumsum(0).to(torch.int32),
        "sparse_columns": columns.to(torch.int16 if short else torch.int32),
        "sparse_values": numbers[rows, columns].clamp(-largest, largest).to(dtype),
    }


def check(values: _Values, k: int) -> str | None:
    """What is wrong with the fields, or None."""
    missing = [name for name in NAMES if name not in values]
    if missing:
        return f"goes with {', '.join(missing)}"
    ends, columns = values["sparse_ends"], values["sparse_columns"]
    entries = columns.numel()
    if ends.numel() and (int(ends[0]) < 0 or bool((ends.diff() < 0).any())):
        return "must not fall from one row to the next"
    last = int(ends[-1]) if ends.numel() else 0
    if last != entries:
        return f"must end with {entries}, the number of entries, got {last}"
    if entries and (int(columns.min()) < 0 or int(columns.max()) >= k):
        return f"must be in 0..{k - 1}, got {int(columns.min())} to {int(columns.max())}"
    return None


def _starts(ends: Tensor) -> Tensor:
    return torch.cat([ends.new_zeros(1), ends[:-1]])


def _rows_of_entries(ends: Tensor, entries: int) -> Tensor:
    """The row of each entry, int64 [entries]."""
    counts = (ends - _starts(ends)).long()
    rows = torch.arange(len(ends), device=ends.device)
    # With their number given, nothing waits for a GPU.
    return rows.repeat_interleave(counts, output_size=entries)


def take_rows(values: _Values, rows: Tensor) -> dict[str, Tensor]:
    """The fields of the rows with the numbers `rows`, int64 [R]."""
    ends = values["sparse_ends"].long()
    starts = _starts(ends)[rows]
    counts = ends[rows] - starts
    total = counts.cumsum(0)
    # Of each entry taken, how many stand before it in its row.
    places = torch.arange(int(counts.sum()), device=rows.device)
    places += (starts - (total - counts)).repeat_interleave(counts)
    return {
        "sparse_ends": total.to(torch.int32),
        "sparse_columns": values["sparse_columns"][places],
        "sparse_values": values["sparse_values"][places],
    }


def take_columns(values: _Values, start: int, stop: int) -> dict[str, Tensor]:
    """The fields of columns [start, stop)."""
    ends, columns = values["sparse_ends"], values["sparse_columns"]
    kept = (columns >= start) & (columns < stop)
    counts = torch.bincount(_rows_of_entries(ends, len(columns))[kept], minlength=len(ends))
    return {
        "sparse_ends": counts.cumsum(0).to(torch.int32),
        "sparse_columns": columns[kept] - start,
        "sparse_values": values["sparse_values"][kept],
    }


def add_to_rows(rows: Tensor, start: int, group: int, values: _Values) -> None:
    """Adds the entries to weight rows fp32 [R, K] from row `start` on, in place."""
    ends = values["sparse_ends"][start : start + len(rows)].long()
    first = int(values["sparse_ends"][start - 1]) if start else 0
    entries = slice(first, int(ends[-1]) if len(ends) else first)
    index = (
        _rows_of_entries(ends - first, entries.stop - first),
        values["sparse_columns"][entries].long(),
    )
    rows.index_put_(index, values["sparse_values"][entries].to(rows.dtype), accumulate=True)


def product(x: Tensor, values: _Values) -> Tensor:
    """What the entries add to y: x [M, K] times them, fp32 [M, N], in the order of the entries."""
    ends, columns = values["sparse_ends"], values["sparse_columns"].int()
    offsets, numbers = torch.cat([ends.new_zeros(1), ends]), values["sparse_values"].float()
    y = torch.empty(len(ends), len(x), dtype=torch.float32, device=x.device)
    turned = x.float().t()
    step = max(1, _AT_ONCE // max(1, len(columns)))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        products = numbers[:, None] * turned[:, part][columns]
        # Unsafe is what looks at no offsets, which were checked: looking would wait for a GPU.
        y[:, part] = torch.segment_reduce(products, "sum", offsets=offsets, unsafe=True)
    return y.t()
