"""Which values of a tensor share a range, and the scale and zero point that a range gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkernels.errors import SchemeError
from qkernels.scheme import Activation


@dataclass(frozen=True)
class Numbers:
    """What values are rounded to.

    Attributes:
        least, most: the ends; `most` alone counts where `symmetric`.
        symmetric: 0 stands for 0, there is no zero point.
        whole: whole numbers; else floats.
    """

    least: float
    most: float
    symmetric: bool = True
    whole: bool = True

    @staticmethod
    def integers(bits: int = 8, *, symmetric: bool = True, signed: bool = True) -> Numbers:
        """Integers of 2 to 16 bits; symmetric ones are signed, and both signs go equally far."""
        if not 2 <= bits <= 16 or (symmetric and not signed):
            raise SchemeError(
                f"integers have 2 to 16 bits, and a sign where they are symmetric; got {bits} "
                f"bits, symmetric={symmetric}, signed={signed}"
            )
        half = 1 << (bits - 1)
        least = 1 - half if symmetric else -half
        return Numbers(least if signed else 0, half - 1 if signed else 2 * half - 1, symmetric)

    @staticmethod
    def of(activation: Activation) -> Numbers:
        """Those that activations of a scheme are rounded to."""
        if activation.is_integer:
            return Numbers.integers(activation.bits, symmetric=not activation.has_zeros)
        return Numbers(-activation.largest, activation.largest, whole=False)

    @property
    def levels(self) -> int:
        """How many numbers a sign has, 0 included; half of all without a sign."""
        return (int(self.most) - int(self.least) + 2) // 2


def scale_and_zero(low: Tensor, high: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """x is about scale * (q - zero).

    Symmetric: scale = max(-low, high) / most, zero = 0. Asymmetric: scale = (high - low) /
    (most - least), zero = least - round(low / scale). An empty range has the scale 1, one that is
    not finite the scale NaN.

    Args:
        low, high: fp32 of one shape, low <= 0 <= high.

    Returns:
        fp32 and int32 of that shape.
    """
    low, high = low.float(), high.float()
    if numbers.symmetric:
        scale = torch.maximum(-low, high) / numbers.most
    else:
        scale = (high - low) / (numbers.most - numbers.least)
    scale = torch.where(scale == 0, 1.0, scale)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    if numbers.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero = (numbers.least - (low / scale).round()).nan_to_num(0.0)
    return scale, zero.clamp(numbers.least, numbers.most).int()


def rounded(x: Tensor, scale: Tensor, zero: Tensor, numbers: Numbers) -> Tensor:
    """What x becomes, fp32: the nearest of the numbers, times their scale. Floats are E4M3."""
    scaled = x.float() / scale
    if not numbers.whole:
        return scaled.clamp(numbers.least, numbers.most).to(torch.float8_e4m3fn).float() * scale
    return (scaled.round() + zero).clamp(numbers.least, numbers.most).sub(zero) * scale


Granularity = Literal["tensor", "channel", "token", "group"]


@dataclass(frozen=True)
class Cells:
    """The values of x [..., S, K] that share a range.

    Attributes:
        granularity: "tensor": all; "channel": each column, of K; "token": each position in the
            sequence, of S; "group": each `group_size` columns, the last of which may be fewer.
        most: positions that are told apart: the last of them and all behind it share a range. None
            for all.
    """

    granularity: Granularity = "tensor"
    group_size: int | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        assert self.most is None or (self.granularity == "token" and self.most >= 1), self
        grouped = self.granularity == "group"
        if grouped != (self.group_size is not None) or (self.group_size or 1) < 1:
            raise SchemeError(
                f"groups, and they alone, have a size of 1 or more, got {self.granularity!r} with "
                f"group_size={self.group_size}"
            )

    def parts(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """fp32 [C, V], the values of C cells, with the number of the first; all cells once."""
        x = x.detach().float()
        x = x if x.dim() > 1 else x.reshape(1, -1)
        if self.granularity == "tensor":
            yield 0, x.reshape(1, -1)
        elif self.granularity == "channel":
            yield 0, x.reshape(-1, x.shape[-1]).t()
        elif self.granularity == "token":
            own = x.movedim(-2, 0).flatten(1)
            first = len(own) if self.most is None else self.most - 1
            if first:
                yield 0, own[:first]
            if first < len(own):
                yield first, own[first:].reshape(1, -1)
        else:
            assert self.group_size is not None
            columns = x.reshape(-1, x.shape[-1]).t()
            whole = len(columns) // self.group_size
            end = whole * self.group_size
            if whole:
                yield 0, columns[:end].reshape(whole, -1)
            if end < len(columns):
                yield whole, columns[end:].reshape(1, -1)


WHOLE = Cells()
"""One range for all of a tensor."""


def grown(tensor: Tensor, cells: int) -> Tensor:
    """`tensor` [C, ...] with zeros for cells up to `cells`."""
    if len(tensor) >= cells:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(cells - len(tensor), *tensor.shape[1:])))
