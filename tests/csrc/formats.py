"""fp16, bf16 and fp32 in plain arithmetic: their bits, and the number nearest to an exact one."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    name: str
    digits: int  # of the mantissa, the leading one too
    lowest: int  # the exponent of the least subnormal number
    limit: float  # infinite from here on, once rounded
    one: int
    special: tuple[int, ...]

    def number(self, bits: int) -> float:
        if self.name == "half":
            return float(np.uint16(bits).view(np.float16))
        if self.name == "single":
            return float(np.uint32(bits).view(np.float32))
        return float(np.uint32(bits << 16).view(np.float32))

    def bits(self, value: float) -> int:
        """Those of a number of this format; of NaN, all but the sign, as arithmetic has it."""
        if np.isnan(value):
            return 0x7FFFFFFF if self.name == "single" else 0x7FFF
        if self.name == "single":
            return int(np.float32(value).view(np.uint32))
        if self.name == "half":
            return int(np.float16(value).view(np.uint16))
        return int(np.float32(value).view(np.uint32)) >> 16

    def nearest(self, exact: Fraction, zero: float) -> float:
        """The number nearest to `exact`, ties to even; `zero` where that is 0, for its sign."""
        if exact == 0:
            return zero
        magnitude = abs(exact)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if magnitude < Fraction(2) ** exponent:
            exponent -= 1
        unit = Fraction(2) ** max(exponent - self.digits + 1, self.lowest)
        rounded = round(magnitude / unit) * unit
        value = float(rounded) if rounded < self.limit else float("inf")
        return -value if exact < 0 else value


FORMATS = [
    # 0, 1, 1 + 2^-5, 1 + 2^-6, largest, least normal and subnormal, largest subnormal, inf, nan
    Format(
        *("half", 11, -24, 65536.0, 0x3C00),
        (0, 0x3C00, 0x3C20, 0x3C10, 0x7BFF, 0x0400, 0x0001, 0x03FF, 0x7C00, 0x7E00),
    ),
    # 0, 1, 1 + 2^-3, 1 + 2^-5, largest, least normal and subnormal, 2^-100, inf, nan
    Format(
        *("bfloat16", 8, -133, 2.0**128, 0x3F80),
        (0, 0x3F80, 0x3F90, 0x3F84, 0x7F7F, 0x0080, 0x0001, 0x0D80, 0x7F80, 0x7FC0),
    ),
]

SINGLE = Format("single", 24, -149, 2.0**128, 0x3F800000, ())
