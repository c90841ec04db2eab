"""A Transformers model as its config describes it, without memory for its parameters."""

from __future__ import annotations

import copy
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.config import QUANTIZATION_KEYS, Config, brief
from qkernels.checkpoints.dense import Place, replace_tensor
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.limits import TooManyParametersError, check_depth, parameters_on_meta
from qkernels.errors import CheckpointError

_BUFFER_BYTES = 4 << 30
"""What a model may compute at least and not save, such as masks for long texts."""


def empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None, check_shapes: Callable[[Any], None]
) -> tuple[Any, torch.dtype]:
    """The model of a folder: parameters on the meta device, buffers as its code computes them.

    Returns the model and the type that is the folder's own, in whose place `dtype` stands.

    Args:
        check_shapes: is called with the model, all of it on the meta device, before anything is
            given memory, and raises where it is not that of the tensors.

    Raises:
        CheckpointError: where Transformers is missing, or does not know the model.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(f"loading needs {error.name}: pip install qkernels[models]") from None
    ours = (*QUANTIZATION_KEYS, layer_types.KEY)
    raw = {key: value for key, value in checkpoint.config.items() if key not in ours}
    path, tensors = checkpoint.store.config_path, len(checkpoint.store)
    with as_checkpoint_error(path, "describes no known model"):
        name = _class_name(raw, path)
        if "auto_map" in raw and not hasattr(transformers, name):
            raise CheckpointError(
                f"{path}: {name} is no model of Transformers but code of its "
                "own, which load_model does not run; from_pretrained of Transformers does, with "
                "trust_remote_code=True, for folders in compressed-tensors"
            )
        check_depth(raw, tensors, path)
        config = transformers.AutoConfig.for_model(**raw)
        architecture = getattr(transformers, name)
        own = getattr(config, "dtype", None) or _common_type(checkpoint)

    def build() -> Any:
        with as_checkpoint_error(path, "describes no known model"), parameters_on_meta(tensors):
            return architecture._from_config(copy.deepcopy(config), dtype=dtype or own)

    _check_memory(build, checkpoint, check_shapes)
    model = build()
    if any(buffer.is_meta for buffer in _unsaved_buffers(model)):
        # Its code makes them of parameters, which must have values for that.
        with as_checkpoint_error(path, "describes no known model"):
            model = architecture._from_config(config, dtype=dtype or own)
    return model, own


def _class_name(config: Config, path: Path) -> str:
    """The class of the model; where none is named, the language model of its type.

    Quantizers that save a model which was made in memory, and not loaded, name none.
    """
    named = config.get("architectures")
    if named is not None:
        return str(named[0])
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
    if name is None:
        raise CheckpointError(
            f"{path} names no architectures, and model_type {brief(config.get('model_type'))} is "
            "no language model of Transformers: add the name of the class"
        )
    return str(name)


def compute_parameters(model: Any, places: Mapping[str, Place]) -> None:
    """Gives those of `places` values that the model's own code computes, such as positions.

    It is the code that Transformers runs for new weights, which draws others at random: what comes
    out different from another seed is left on the meta device.
    """
    for place in places.values():
        made = [_initialized(model, place, seed) for seed in (0, 1)]
        if torch.equal(*made):
            replace_tensor([place], made[0])


def _initialized(model: Any, place: Place, seed: int) -> Tensor:
    module = copy.deepcopy(place.module).to_empty(device="cpu", recurse=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for tensor in module._parameters.values():
            if tensor is not None and tensor.is_floating_point():
                # Never equal, where it is not written.
                tensor.fill_(math.nan)
        torch.manual_seed(seed)
        model._init_weights(module)
    found: Tensor = getattr(module, place.name).detach()
    return found


def _check_memory(
    build: Callable[[], Any], checkpoint: Checkpoint, check_shapes: Callable[[Any], None]
) -> None:
    """Raises where the model would need memory that its files give no reason for."""
    try:
        with torch.device("meta"):
            model = build()
    except TooManyParametersError:
        raise
    except CheckpointError:
        # Code that asks for values cannot be tried like this, and what is wrong comes up again.
        return
    check_shapes(model)
    stored = sum(checkpoint.store.nbytes(name) for name in checkpoint.store)
    extra = sum(b.nbytes for name, b in model.named_buffers() if name not in checkpoint.store)
    if extra > max(stored, _BUFFER_BYTES):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} asks for {extra:.2e} bytes that the model "
            f"computes, and the files hold {stored:.2e}"
        )


def _common_type(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type that most numbers outside of quantized layers have."""
    numbers: Counter[torch.dtype] = Counter()
    for name in checkpoint.dense:
        numbers[checkpoint.store.dtype(name)] += math.prod(checkpoint.store.shape(name))
    floating = [dtype for dtype, _ in numbers.most_common() if dtype.is_floating_point]
    return floating[0] if floating else torch.get_default_dtype()


def _unsaved_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                yield buffer
