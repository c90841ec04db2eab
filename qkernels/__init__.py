"""Quantized linear layers: hand-written kernels behind one module, `WQLinear`."""

from qkernels import errors
from qkernels.checkpoints import load_model, save_model
from qkernels.errors import QuantizationError
from qkernels.modules import WQLinear, WQLinear_GEMM, WQLinear_GEMV
from qkernels.ops import linear, quantize_per_token
from qkernels.quantizers.model import LayerReport, QuantizationReport, quantize_model
from qkernels.scheme import QuantScheme, table_type
from qkernels.select import Explanation, explain
from qkernels.weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LayerReport",
    "QuantScheme",
    "QuantizationError",
    "QuantizationReport",
    "QuantizedWeight",
    "WQLinear",
    "WQLinear_GEMM",
    "WQLinear_GEMV",
    "errors",
    "explain",
    "linear",
    "load_model",
    "quantize_model",
    "quantize_per_token",
    "save_model",
    "table_type",
]
