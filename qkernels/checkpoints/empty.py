"""A Transformers model as its config describes it, without memory for its parameters."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.config import QUANTIZATION_KEYS
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.errors import CheckpointError


def empty_model(checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """The model of a folder: parameters on the meta device, buffers as its code computes them.

    Returns the model and the type that is the folder's own, in whose place `dtype` stands.

    Raises:
        CheckpointError: where Transformers is missing, or does not know the model.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(f"loading needs {error.name}: pip install qkernels[models]") from None
    raw = {key: v for key, v in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    with as_checkpoint_error(checkpoint.folder / "config.json", "describes no known model"):
        config = transformers.AutoConfig.for_model(**raw)
        architecture = getattr(transformers, raw["architectures"][0])
        own = getattr(config, "dtype", None) or _common_type(checkpoint)

        def build() -> Any:
            return architecture._from_config(config, dtype=dtype or own)

        with _parameters_on_meta():
            model = build()
        if any(buffer.is_meta for buffer in _unsaved_buffers(model)):
            # Its code makes them of parameters, which must have values for that.
            model = build()
    return model, own


def _common_type(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type that most numbers outside of quantized layers have."""
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint.dense:
        numbers[checkpoint.store.dtype(name)] += math.prod(checkpoint.store.shape(name))
    floating = [dtype for dtype, _ in numbers.most_common() if dtype.is_floating_point]
    return floating[0] if floating else torch.get_default_dtype()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, a parameter that a module registers goes to the meta device.

    Under `torch.device("meta")` buffers would go there too, and those that are not saved be lost.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _unsaved_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                yield buffer
