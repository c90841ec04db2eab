"""What scales can be where they are stored: in the type of theirs, as multiples of a channel's, or
as codes of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.fields import NESTED_BLOCK
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters, nested_table


@dataclass(frozen=True)
class Scales:
    """Scales of R groups.

    Attributes:
        stored: [R], as the field `scales` has them.
        values: fp32 [R], what codes are multiplied by.
    """

    stored: Tensor
    values: Tensor

    def where(self, mask: Tensor, other: Scales) -> Scales:
        """These where `mask` [R] is true, else the others."""
        return Scales(
            torch.where(mask, self.stored, other.stored),
            torch.where(mask, self.values, other.values),
        )


@dataclass(frozen=True)
class ScaleForm:
    """How the scales of rows [R] are stored in one group.

    Attributes:
        nearest: fp32 [R] -> the scales that can be stored which are nearest.
        channels: fp32 [R], those of channels where scales are multiples of them; else None.
    """

    scheme: QuantScheme
    nearest: Callable[[Tensor], Scales]
    channels: Tensor | None = None

    def limits(self, scales: Scales, zeros: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The least and the largest code of linear weights that a kernel can take, fp32 [R]; None
        where it takes all."""
        if self.channels is None:
            return None
        return rounding.product_limits(scales.stored.float(), zeros, self.scheme)


def scale_form(parameters: WeightParameters, start: int, stop: int, group: int) -> ScaleForm:
    """That of a group in rows [start, stop); per tensor, of the whole weight."""
    return _FORMS[parameters.scheme.scale_levels](parameters, start, stop, group)


def _floating(parameters: WeightParameters, start: int, stop: int, group: int) -> ScaleForm:
    scheme = parameters.scheme
    least = rounding.least_scale(scheme.scale_dtype)

    def nearest(wanted: Tensor) -> Scales:
        # A group that is zero has scales of zero where nothing else keeps it so.
        stored = wanted.to(scheme.scale_dtype)
        stored = torch.where(wanted == 0, stored, stored.clamp(min=least))
        return Scales(stored, stored.float())

    return ScaleForm(scheme, nearest)


def _multiples(parameters: WeightParameters, start: int, stop: int, group: int) -> ScaleForm:
    assert parameters.channel_scales is not None
    scheme, channels = parameters.scheme, parameters.channel_scales[start:stop]
    most = rounding.most_multiplier(scheme)

    def nearest(wanted: Tensor) -> Scales:
        stored = (wanted / channels).round_().clamp_(1, most).to(torch.uint8)
        return Scales(stored, stored.float() * channels)

    return ScaleForm(scheme, nearest, channels)


def _nested(parameters: WeightParameters, start: int, stop: int, group: int) -> ScaleForm:
    table = nested_table(parameters.scales.device)
    assert parameters.nested_absmax is not None and parameters.nested_offset is not None
    rows = torch.arange(start, stop, device=table.device)
    number = rows * parameters.scheme.groups(parameters.k) + group
    step, offset = parameters.nested_absmax[number // NESTED_BLOCK], parameters.nested_offset

    def nearest(wanted: Tensor) -> Scales:
        scaled = (wanted - offset) / rounding.nonzero(step)
        codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
        return Scales(codes.to(torch.uint8), table[codes] * step + offset)

    return ScaleForm(parameters.scheme, nearest)


_FORMS = {"one": _floating, "two": _multiples, "double": _nested}
