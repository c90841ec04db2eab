"""Checkpoint formats. Each knows how to become `QuantizedWeight`s and to be written from them."""

from qkernels.checkpoints.checkpoint import Checkpoint, open_checkpoint, read_weights
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind, says_method
from qkernels.checkpoints.load import load_model
from qkernels.checkpoints.pretrained import mark_quantized
from qkernels.checkpoints.save import save_model
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.table import FORMATS, check_scheme, is_quantized

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Format",
    "Store",
    "StoredLayer",
    "WeightKind",
    "check_scheme",
    "is_quantized",
    "load_model",
    "mark_quantized",
    "open_checkpoint",
    "read_weights",
    "save_model",
    "says_method",
]
