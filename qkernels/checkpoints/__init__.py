"""Checkpoint formats. Each knows how to become `QuantizedWeight`s and to be written from them."""

from qkernels.checkpoints.folders import load_model, save_model

__all__ = ["load_model", "save_model"]
