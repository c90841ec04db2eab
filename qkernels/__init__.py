"""Quantized linear layers: hand-written kernels behind one module, `WQLinear`."""

from qkernels import errors, functional
from qkernels.activations import (
    QuantizedActivation,
    add_rms_norm_quantize,
    gelu_mul_quantize,
    layer_norm_quantize,
    quantize_activation,
    quantize_per_tensor,
    quantize_per_token,
    quantize_per_token_asymmetric,
    rms_norm_quantize,
    silu_mul_quantize,
)
from qkernels.checkpoints import load_model, save_model
from qkernels.checkpoints.registration import register_with_transformers
from qkernels.errors import QuantizationError
from qkernels.integrations.decoding import prepare_decoding
from qkernels.integrations.fuse import FuseReport, fuse, unfuse
from qkernels.integrations.modules import replace_linears
from qkernels.modules import (
    WQEmbedding,
    WQLinear,
    WQLinear_GEMM,
    WQLinear_GEMV,
    WQLinear_GEMVFast,
)
from qkernels.ops import linear, linear_grouped
from qkernels.quantizers.model import quantize_model
from qkernels.quantizers.qat import convert_qat, prepare_qat, undo_qat
from qkernels.quantizers.report import LayerReport, QuantizationReport
from qkernels.quantizers.streaming import quantize_folder
from qkernels.scheme import QuantScheme, table_type
from qkernels.select import Explanation, explain
from qkernels.weight import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FuseReport",
    "LayerReport",
    "QuantScheme",
    "QuantizationError",
    "QuantizationReport",
    "QuantizedActivation",
    "QuantizedWeight",
    "WQEmbedding",
    "WQLinear",
    "WQLinear_GEMM",
    "WQLinear_GEMV",
    "WQLinear_GEMVFast",
    "add_rms_norm_quantize",
    "convert_qat",
    "errors",
    "explain",
    "functional",
    "fuse",
    "gelu_mul_quantize",
    "layer_norm_quantize",
    "linear",
    "linear_grouped",
    "load_model",
    "prepare_decoding",
    "prepare_qat",
    "quantize_activation",
    "quantize_folder",
    "quantize_model",
    "quantize_per_tensor",
    "quantize_per_token",
    "quantize_per_token_asymmetric",
    "replace_linears",
    "rms_norm_quantize",
    "save_model",
    "silu_mul_quantize",
    "table_type",
    "undo_qat",
    "unfuse",
]

register_with_transformers()
