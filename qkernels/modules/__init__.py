"""Modules that take the place of `nn.Linear`."""

from qkernels.modules.awq import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from qkernels.modules.linear import WQLinear

__all__ = ["WQLinear", "WQLinear_GEMM", "WQLinear_GEMV", "WQLinear_GEMVFast"]
