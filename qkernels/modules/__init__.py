"""Modules that take the place of `nn.Linear` and `nn.Embedding`."""

from qkernels.modules.awq import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from qkernels.modules.embedding import WQEmbedding
from qkernels.modules.fake_quant import FakeQuantLinear
from qkernels.modules.linear import WQLinear

__all__ = [
    "FakeQuantLinear",
    "WQEmbedding",
    "WQLinear",
    "WQLinear_GEMM",
    "WQLinear_GEMV",
    "WQLinear_GEMVFast",
]
