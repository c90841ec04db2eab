"""The schemes that tests run over: each weight type, granularity, scale form and activation."""

import torch

from qkernels.scheme import QuantScheme

TABLE = "table(-1.0,-0.8,-0.6,-0.45,-0.3,-0.2,-0.1,0.0,0.1,0.2,0.3,0.4,0.55,0.7,0.85,1.0)-g32"

BLOCKS = ("w3a16-g16-spqr", "w4a16-g32-spqr-sfp32")
WEIGHT_ONLY = (
    *("w4a16-g128", "w4a16-g64-sym", "w4a16", "w4a16-gtensor", "w4a16-g24", "w4a16-g64-sbf16"),
    *("w3a16-g64", "w3a16-sym", "w2a16-g32", "w8a16", "w8a16-g64-sym", "w4a16-g64-sfp32"),
    *("nf4-g64", "nf4-g64-dq", "fp4-g32", TABLE, "fp8e4m3-a16", "fp8e5m2-a16-g64"),
    *("log4-g32", "log3-g64", "binary-g64", "nf4-g4-sfp32", "w4a16-g3"),
    *BLOCKS,
)
INT8_ACTIVATION = (
    *("w8a8", "w8a8-tensor", "w8a8-static", "w8a8-g64", "w8a8-gtensor"),
    *("w8a8-position", "w4a8-g64-position"),
    *("w4a8", "w4a8-g64", "w4a8-g64-asym", "w4a8-g64-flat", "w4a8-g100-asym-flat"),
    *("w3a8-g64", "w2a8-g64", "w8a8-g6"),
)
INT4_ACTIVATION = (
    *("w4a4", "w4a4-g64", "w4a4-g64-flat", "w8a4-tensor", "w8a4-static"),
    "w4a4-g64-position",
    *("w3a4-g64-asym", "w2a4-g24-flat"),
)
OUTLIERS_APART = ("w8a8-outliers1", "w4a8-g64-outliers2", "w4a4-g64-outliers2")
"""Thresholds that numbers of a normal distribution pass."""
ZERO_POINT_ACTIVATION = ("w8a8-tokenasym", "w4a8-g64-tokenasym", "w4a4-g64-tokenasym")
POSITIONS = ("w8a8-position", "w4a8-g64-position", "w4a4-g64-position")
FLOAT8_ACTIVATION = ("fp8-a8", "fp8-a8-static", "fp8-a8-tensor", "w4afp8-g64", "nf4-afp8-g64")

ALL = (
    *(*WEIGHT_ONLY, *INT8_ACTIVATION, *INT4_ACTIVATION, *ZERO_POINT_ACTIVATION),
    *(*OUTLIERS_APART, *FLOAT8_ACTIVATION),
)
NOT_STATIC = tuple(text for text in ALL if not QuantScheme.parse(text).activation.is_static)
"""Those that need no calibration."""

REFERENCE_OR_CPU = (
    *(*ZERO_POINT_ACTIVATION, *POSITIONS, *OUTLIERS_APART, *BLOCKS),
    *("nf4-g4-sfp32", "w4a16-g3", "w8a8-g6"),
)
"""What Triton's kernels do not take: activations with zero points or scales per position, groups
under 16 columns, scales in blocks."""


def activation_scale(scheme: QuantScheme | str, x: torch.Tensor) -> float | torch.Tensor | None:
    """The static scale of x where `scheme` takes one; of positions, three that are different."""
    activation = QuantScheme.parse(scheme).activation
    if activation.granularity not in ("static", "position"):
        return None
    whole = float(x.abs().max()) / {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[activation.dtype]
    return whole if activation.granularity == "static" else whole * torch.tensor([1, 0.5, 0.8])
