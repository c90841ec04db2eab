"""What Transformers' own methods do on models with quantized layers."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from qkernels.checkpoints.dense import quantized_layers
from qkernels.checkpoints.ties import tie_no_quantized_layer
from qkernels.positions import follow_cache


def mark_quantized(model: nn.Module, format: str | None = None) -> None:
    """Makes `save_pretrained` write what `save_model` writes, and ties only dense layers.

    Takes each Transformers model in `model` that has `WQLinear` layers, `model` itself included.
    Without this Transformers would write their buffers as if they were parameters of its own, and
    read them back as random weights. Layers with scales per position are told what a cache holds.

    Args:
        format: what they are saved in; see `StoredHfQuantizer`.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        # Then no model is one of its own.
        return
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and quantized_layers(module):
            hook = importlib.import_module("qkernels.checkpoints.hf_quantizer")
            module.hf_quantizer = hook.StoredHfQuantizer(hook.StoredConfig(), format=format)
            tie_no_quantized_layer(module)
            if any(m.scheme.activation.by_position for m in quantized_layers(module).values()):
                follow_cache(module)
