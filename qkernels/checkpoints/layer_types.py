"""The types that quantized layers stand for, where these are not the model's own.

Model code asks a layer for the type of its weight, such as T5 for a layer that stays in fp32 beside
others of fp16. Files of quantized layers do not say it, so config.json does:

    "qkernels_layer_dtypes": {"float32": [name, ...]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from qkernels.checkpoints.config import Config, brief, strings, typed
from qkernels.errors import CheckpointError
from qkernels.modules.packed import PackedModule
from qkernels.modules.rows import whole_name

KEY = "qkernels_layer_dtypes"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def written(layers: Mapping[str, PackedModule], own: torch.dtype) -> dict[str, list[str]]:
    """What config.json says of the layers that stand for another type than `own`."""
    named: dict[str, dict[str, None]] = {}
    for name, layer in layers.items():
        if layer.dtype != own:
            dtype = str(layer.dtype).removeprefix("torch.")
            # Parts of a layer stand for one type.
            named.setdefault(dtype, {})[whole_name(name)] = None
    return {dtype: list(names) for dtype, names in named.items()}


def stated(config: Config) -> dict[str, list[str]]:
    """Type -> names of layers, as a config.json has them.

    Raises:
        CheckpointError: for what is no object with lists of names.
    """
    said = typed(config.get(KEY, {}), dict, KEY)
    return {text: strings(names, f"{KEY}.{text}") for text, names in said.items()}


def read(config: Config, layers: Collection[str]) -> dict[str, torch.dtype]:
    """The types that a config.json names, by layer.

    Raises:
        CheckpointError: for what is no type, or no layer.
    """
    found = {}
    for text, names in stated(config).items():
        if text not in _DTYPES:
            raise CheckpointError(
                f"{KEY} names {brief(text)}, which is not one of {', '.join(_DTYPES)}"
            )
        for name in names:
            if name not in layers:
                raise CheckpointError(f"{KEY} names {brief(name)}, which is no quantized layer")
            found[name] = _DTYPES[text]
    return found
