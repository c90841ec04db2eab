"""From stored codes to numbers: the values of `w = scale * (value(code) - zero)`.

A decode function takes an int32 tile of codes and gives the fp32 tile of their values. All have the
signature `(code, codebook, BITS)`, so that a kernel takes one as an argument. `DECODE` below is
the table of them by name, `CODE_BITS` says which widths each takes.
"""

import triton
import triton.language as tl

from .numerics import INTERPRETED

# fp32 whose unit in the last place is 1: OR-ing a small integer into its bits adds it. That is one
# logic operation and one subtraction, where an int-to-float conversion runs at a quarter rate.
_UNIT_BITS = tl.constexpr(0x4B000000)
_UNIT = tl.constexpr(8388608.0)


@triton.jit
def decode_unsigned(code, codebook, BITS: tl.constexpr):
    """The code itself; zero points are subtracted by the caller."""
    return (code | _UNIT_BITS).to(tl.float32, bitcast=True) - _UNIT


@triton.jit
def decode_raised(code, codebook, BITS: tl.constexpr):
    """2^23 + code, for zero points that are raised like it: one subtraction takes both away."""
    return (code | _UNIT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def decode_signed(code, codebook, BITS: tl.constexpr):
    """code - 2^(BITS-1), for symmetric linear types."""
    return (code | _UNIT_BITS).to(tl.float32, bitcast=True) - (_UNIT + (1 << (BITS - 1)))


@triton.jit
def table_entry(address):
    """The fp32 numbers at these addresses of a table that stays in L1.

    Compiled, not by `tl.load`: Triton's pipeliner would keep whole tiles of it in shared memory.
    """
    if INTERPRETED:
        value = tl.load(address)
    else:
        value = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [address.to(tl.int64)], tl.float32, True, 1
        )
    return value


@triton.jit
def decode_codebook(code, codebook, BITS: tl.constexpr):
    """codebook[code], of 2^BITS fp32 values; `codebook` is what `load_codebook` gives."""
    if BITS == 1:
        # One of a few values is chosen faster than it is loaded, and in fewer registers.
        value = tl.where(code == 0, codebook[0], codebook[1])
    elif BITS == 2:
        # Tests of single bits, which need no shift of the word before them.
        is_even = (code & 1) == 0
        low = tl.where(is_even, codebook[0], codebook[1])
        high = tl.where(is_even, codebook[2], codebook[3])
        value = tl.where((code & 2) == 0, low, high)
    else:
        value = table_entry(codebook + code)
    return value


@triton.jit
def decode_fp8e4m3(code, codebook, BITS: tl.constexpr):
    """The value of a float8_e4m3fn bit pattern.

    Its 4 exponent bits land in the 5 of fp16, whose bias is larger by 8: hence the factor 2^8,
    which holds for subnormals too. sm_80 and sm_86 have no conversion instruction, so this serves
    all capabilities.
    """
    half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def decode_fp8e5m2(code, codebook, BITS: tl.constexpr):
    """The value of a float8_e5m2 bit pattern: the upper byte of an fp16 number."""
    return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_as_stored(stored):
    """A zero point in fp32."""
    return stored.to(tl.float32)


@triton.jit
def zero_raised(stored):
    """2^23 + a zero point of uint8."""
    return (stored.to(tl.int32) | _UNIT_BITS).to(tl.float32, bitcast=True)


DECODE = {
    "unsigned": decode_unsigned,
    "signed": decode_signed,
    "codebook": decode_codebook,
    "fp8e4m3": decode_fp8e4m3,
    "fp8e5m2": decode_fp8e5m2,
}

CODE_BITS = {
    "unsigned": (2, 3, 4, 8),
    "signed": (2, 3, 4, 8),
    "codebook": (1, 2, 3, 4),
    "fp8e4m3": (8,),
    "fp8e5m2": (8,),
}
