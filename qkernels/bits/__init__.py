"""Codes to packed words and back: the orders of bits, which nothing outside of here knows.

An order has up to three implementations that agree bit for bit: plain torch (the truth), C++ on the
CPU and Triton on a GPU. `pack_*` and `unpack_*` take the fastest there is.
"""

from qkernels.bits.awq import (
    divide_awq_fast,
    pack_awq,
    pack_awq_fast,
    unpack_awq,
    unpack_awq_fast,
)
from qkernels.bits.dense import DENSE_BITS, dense_words, pack_dense, unpack_dense
from qkernels.bits.gptq import pack_gptq, pack_gptq_zeros, unpack_gptq, unpack_gptq_zeros
from qkernels.bits.marlin import (
    marlin_bias,
    marlin_scales,
    marlin_zeros,
    pack_marlin,
    unpack_marlin,
)
from qkernels.bits.planar import PLANAR_BITS, pack_planar, planar_rows, unpack_planar
from qkernels.bits.tinygemm import unpack_tinygemm

__all__ = [
    "DENSE_BITS",
    "PLANAR_BITS",
    "dense_words",
    "divide_awq_fast",
    "marlin_bias",
    "marlin_scales",
    "marlin_zeros",
    "pack_awq",
    "pack_awq_fast",
    "pack_dense",
    "pack_gptq",
    "pack_gptq_zeros",
    "pack_marlin",
    "pack_planar",
    "planar_rows",
    "unpack_awq",
    "unpack_awq_fast",
    "unpack_dense",
    "unpack_gptq",
    "unpack_gptq_zeros",
    "unpack_marlin",
    "unpack_planar",
    "unpack_tinygemm",
]
