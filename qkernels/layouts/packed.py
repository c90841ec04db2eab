"""A weight in the memory order of one kernel family, and the table of such orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkernels.errors import WeightError
from qkernels.fields import FIELDS, fields_of_rows
from qkernels.scheme import QuantScheme
from qkernels.weight import (
    QuantizedWeight,
    WeightParameters,
    block_numbers,
    check_parameters,
    code_values,
    nested_scales,
    row_slices,
)


@dataclass(frozen=True)
class Layout:
    """A row of the layout table. Codes go in and out in slices of rows; the rest is held whole.

    Attributes:
        name: as stored in `PackedWeight.layout`.
        why_not: the reason why this layout cannot hold a scheme, or None.
        allocate: (scheme, n, k, device) -> the words, uninitialized.
        pack_rows: (scheme, words, start, codes [rows, K] uint8): writes rows from `start` on.
        unpack_rows: (scheme, words, start, stop, k) -> codes [stop - start, K] uint8.
        store_groups: (scheme, n, scales or zeros as the hub has them) -> as the layout has them.
        load_groups: (scheme, n, scales or zeros of the layout) -> the hub's: [N, G], or [1, 1].
        take_rows: (scheme, words, rows int64 [R], k) -> codes [R, K] uint8 of those rows alone.
        take_groups: (scales or zeros of the layout, rows int64 [R]) -> those of the rows [R, G], of
            a scheme that has them for each row.
        take_columns: (scheme, words, columns int64 [C], n, k) -> codes [N, C] uint8 of those
            columns alone; None where all are unpacked for that.
    """

    name: str
    why_not: Callable[[QuantScheme], str | None]
    allocate: Callable[[QuantScheme, int, int, torch.device], Tensor]
    pack_rows: Callable[[QuantScheme, Tensor, int, Tensor], None]
    unpack_rows: Callable[[QuantScheme, Tensor, int, int, int], Tensor]
    store_groups: Callable[[QuantScheme, int, Tensor], Tensor]
    load_groups: Callable[[QuantScheme, int, Tensor], Tensor]
    take_rows: Callable[[QuantScheme, Tensor, Tensor, int], Tensor]
    take_groups: Callable[[Tensor, Tensor], Tensor]
    take_columns: Callable[[QuantScheme, Tensor, Tensor, int, int], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [n, k] as the buffers of one layout. Which buffers there are depends on the scheme.

    Buffers: "words", then the fields that the weight has, in the order of `fields.FIELDS`.
    """

    scheme: QuantScheme
    layout: Layout
    n: int
    k: int
    buffers: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        return self.buffers["words"].device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def parameters(self) -> WeightParameters:
        """Everything but the codes, in the hub's shapes."""
        fields = {name: buffer for name, buffer in self.buffers.items() if name != "words"}
        for name, buffer in fields.items():
            if FIELDS[name].by_group:
                fields[name] = self.layout.load_groups(self.scheme, self.n, buffer)
        return WeightParameters(scheme=self.scheme, n=self.n, k=self.k, **fields)

    def codes(self, start: int = 0, stop: int | None = None) -> Tensor:
        """uint8 codes [stop - start, K] of rows [start, stop)."""
        stop = self.n if stop is None else stop
        return self.layout.unpack_rows(self.scheme, self.buffers["words"], start, stop, self.k)

    def unpack(self, bias: Tensor | None = None) -> QuantizedWeight:
        """The hub form, exactly what was packed, with `bias` added to it."""
        parameters = self.parameters()
        codes = torch.empty(self.n, self.k, dtype=torch.uint8, device=self.device)
        for start, stop in row_slices(self.n, self.k):
            codes[start:stop] = self.codes(start, stop)
        return QuantizedWeight(scheme=self.scheme, codes=codes, bias=bias, **parameters.fields)

    def look_up(self, rows: Tensor) -> Tensor:
        """The rows of the weight with the numbers `rows`, int64 [R] in [0, N): fp32 [R, K].

        No others are unpacked. They are those of `QuantizedWeight.dequantize`, bit for bit.
        """
        scheme, layout = self.scheme, self.layout
        fields = {}
        for name, buffer in self.buffers.items():
            if name == "words":
                continue
            axes = FIELDS[name].axes
            if FIELDS[name].by_group and scheme.per_tensor:
                fields[name] = layout.load_groups(scheme, self.n, buffer)
            elif FIELDS[name].by_group:
                fields[name] = layout.take_groups(buffer, rows)
            else:
                fields[name] = buffer.index_select(axes.index("n"), rows) if "n" in axes else buffer
        if scheme.scale_levels == "double":
            # Their blocks go over all rows, so that those taken have one level of scales.
            nested = fields.pop("nested_absmax"), fields.pop("nested_offset")
            fields["scales"] = nested_scales(fields["scales"], rows, *nested)
            scheme = replace(scheme, scale_levels="one", scale_dtype=torch.float32)
        if scheme.scale_levels == "blocks":
            numbers = block_numbers(fields["scales"], rows, fields.pop("block_ranges"))
            fields["scales"], fields["zeros"] = numbers
            scheme = replace(scheme, scale_levels="one", scale_dtype=torch.float32)
        held = {name: buffer for name, buffer in self.buffers.items() if name != "words"}
        fields |= fields_of_rows(held, rows)
        taken = WeightParameters(scheme=scheme, n=len(rows), k=self.k, **fields)
        codes = layout.take_rows(self.scheme, self.buffers["words"], rows, self.k)
        return taken.to_column_order(taken.dequantize_rows(codes, 0))

    def columns(self, columns: Tensor) -> Tensor:
        """Columns of the weight, int64 [C] in the codes' order, fp32 [N, C]: those of
        `dequantize_rows`, bit for bit."""
        parameters, take = self.parameters(), self.layout.take_columns
        if take is None or parameters.beyond_codes(0, 0) is not None:
            slices = row_slices(self.n, self.k)
            return torch.cat([self.dequantize_rows(*part)[:, columns] for part in slices])
        codes = take(self.scheme, self.buffers["words"], columns, self.n, self.k)
        values, groups = (
            code_values(self.scheme, codes),
            columns // self.scheme.group_length(self.k),
        )
        zeros = parameters.group_zeros()
        if zeros is not None:
            values -= zeros[:, groups]
        return values.mul_(parameters.group_scales()[:, groups])

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, fp32, in the codes' column order."""
        return self.parameters().dequantize_rows(self.codes(start, stop), start)


def allocate(layout: Layout, parameters: WeightParameters, device: torch.device) -> PackedWeight:
    """A packed weight with its parameters in place and its words still to be written.

    Raises:
        WeightError: for parameters that do not fit their scheme.
    """
    check_parameters(parameters)
    p = parameters
    reason = layout.why_not(p.scheme)
    if reason is not None:
        raise WeightError(f"the {layout.name} layout does not take {p.scheme}: it {reason}")
    buffers = {"words": layout.allocate(p.scheme, p.n, p.k, device)}
    for name, value in p.fields.items():
        stored = layout.store_groups(p.scheme, p.n, value) if FIELDS[name].by_group else value
        buffers[name] = stored.to(device).contiguous()
    return PackedWeight(p.scheme, layout, p.n, p.k, buffers)


def empty_like(packed: PackedWeight, layout: Layout, device: torch.device) -> PackedWeight:
    """Uninitialized buffers of `layout` for the weight of `packed`, in its shapes and types."""
    scheme, n, k = packed.scheme, packed.n, packed.k
    buffers = {"words": layout.allocate(scheme, n, k, device)}
    for name, buffer in packed.buffers.items():
        if name != "words":
            shape = buffer.shape
            if FIELDS[name].by_group:
                hub = [size or 0 for size in FIELDS[name].shape(scheme, n, k)]
                shape = layout.store_groups(scheme, n, torch.empty(hub, device="meta")).shape
            buffers[name] = torch.empty(shape, dtype=buffer.dtype, device=device)
    return PackedWeight(scheme, layout, n, k, buffers)


def write_rows(packed: PackedWeight, start: int, codes: Tensor) -> None:
    """Packs uint8 `codes` [rows, K] into the rows of `packed` from `start` on."""
    packed.layout.pack_rows(packed.scheme, packed.buffers["words"], start, codes)


def pack(
    weight: QuantizedWeight, layout: Layout, device: torch.device | None = None
) -> PackedWeight:
    """`weight` in `layout`, on `device` or where it is; extra memory is one slice at a time."""
    device = weight.codes.device if device is None else torch.device(device)
    packed = allocate(layout, weight.parameters, device)
    for start, stop in row_slices(weight.n, weight.k):
        write_rows(packed, start, weight.codes[start:stop].to(device))
    return packed
