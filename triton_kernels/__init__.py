"""Triton kernels for quantized products. They take tensors and integers, and know no scheme.

planar, decode               the layout of a weight; from its codes to numbers
operands, partition, reduce  what the kernels of the products share: loads of x, words and
                             groups; the part of y and K of a program; the end of a product
weight_only_gemm, weight_only_gemv, int8_gemm    a kernel and its launcher each
quantize_rows, pack          the other kernels
config, product, launch      schedules, checked operands, launches as values
specializations, compile     every kernel for every GPU, without one
tune                         the tuned schedules
"""

from .config import GemmConfig, GemvConfig, choose_gemm_config, choose_gemv_config
from .int8_gemm import int8_gemm
from .pack import pack_dense, pack_planar, unpack_dense, unpack_planar
from .planar import PlanarWeight, values_per_word, word_rows
from .quantize_rows import quantize_rows, quantize_rows_of
from .weight_only_gemm import weight_only_gemm
from .weight_only_gemv import weight_only_gemv

__all__ = [
    "GemmConfig",
    "GemvConfig",
    "PlanarWeight",
    "choose_gemm_config",
    "choose_gemv_config",
    "int8_gemm",
    "pack_dense",
    "pack_planar",
    "quantize_rows",
    "quantize_rows_of",
    "unpack_dense",
    "unpack_planar",
    "values_per_word",
    "weight_only_gemm",
    "weight_only_gemv",
    "word_rows",
]
