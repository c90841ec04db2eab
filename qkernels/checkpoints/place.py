"""Quantized layers of a folder, put into the places of a model's dense ones.

The folder has the model's names here: see `names.in_names_of`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.checkpoint import Checkpoint
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.errors import CheckpointError
from qkernels.modules.embedding import WQEmbedding
from qkernels.modules.experts import fused_experts, unfuse
from qkernels.modules.kinds import (
    is_embedding_kind,
    is_plain_embedding,
    is_plain_linear,
    linear_parts,
)
from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import PackedModule
from qkernels.modules.rows import WQRows
from qkernels.progress import Progress, silent
from qkernels.weight import QuantizedWeight

UNUSED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$")
"""Tensors that some versions of Transformers store and others compute: they change nothing."""


def find_linears(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The layers of the model that quantized ones are to take the place of, by name.

    Experts that are stored one by one are taken apart in the model.

    Raises:
        CheckpointError: for stored layers that the model has no place for.
    """
    _unfuse_experts(model, checkpoint)
    found = {}
    for name, stored in checkpoint.layers.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            if all(is_unused(model, tensor) for tensor in stored.tensors):
                continue
            raise CheckpointError(
                f"{checkpoint.folder}: the model has no layer {name}, which is in the file"
            ) from None
        if not is_plain_linear(layer) and not is_plain_embedding(layer):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is quantized in the file, and in the model a "
                f"{type(layer).__name__}, which is not supported"
            )
        found[name] = layer
    return found


def place_layers(
    model: nn.Module,
    checkpoint: Checkpoint,
    linears: Mapping[str, nn.Module],
    device_of: Callable[[str], torch.device],
    *,
    cast: Callable[[Tensor], Tensor],
    check_kernels: bool,
    progress: Progress = silent,
) -> None:
    """Reads the layers `linears` one by one and puts each, packed, in its place in the model.

    Args:
        linears: what `find_linears` says.
        device_of: name of a layer -> its device.
        cast: a tensor that is not quantized, as the model has it.

    Raises:
        CheckpointError: for tensors that are damaged or do not fit the model.
    """
    types = layer_types.read(checkpoint.config, checkpoint.layers)
    made: dict[int, nn.Module] = {}
    shared = {name: checkpoint.layers[name].shares for name in linears}
    # What has the weight of another layer comes after that.
    names = sorted(linears, key=lambda name: shared[name] in linears)
    for number, name in enumerate(names):
        progress(number, len(names), name)
        linear = linears[name]
        if shared[name] in linears:
            source = model.get_submodule(str(shared[name]))
            embedding = _embedding(checkpoint, name, linear, source, types.get(name))
            model.set_submodule(name, made.setdefault(id(linear), embedding))
            continue
        weights = checkpoint.read_parts(name)
        if checkpoint.format.idle_biases:
            weights = [_without_idle_bias(weight, linear) for weight in weights]
        _check_layer(checkpoint, name, linear, weights)
        layer = _packed_layer(
            linear,
            weights,
            device=device_of(name),
            dtype=types.get(name, linear_parts(linear).weight.dtype),
            cast=cast,
            check_kernels=check_kernels,
        )
        # One layer under several names stays one.
        first = made.setdefault(id(linear), layer)
        if first is not layer:
            _check_same(checkpoint, name, layer, first)
        model.set_submodule(name, first)
        del layer
        give_back_free_pages()
    progress(len(names), len(names), "")


def _packed_layer(
    before: nn.Module,
    weights: list[QuantizedWeight],
    *,
    device: torch.device,
    dtype: torch.dtype,
    cast: Callable[[Tensor], Tensor],
    check_kernels: bool,
) -> nn.Module:
    """What takes the place of `before`; `weights` is emptied as they are packed."""
    if is_embedding_kind(before):
        embedding = WQEmbedding.from_weight(weights.pop(), device=device, dtype=dtype)
        embedding.stand_in_for(before)
        return embedding
    packed = []
    while weights:
        weight = weights.pop(0)
        if weight.bias is not None:
            weight = weight.replace(bias=cast(weight.bias))
        part = WQLinear.from_weight(weight, device=device, check_kernels=check_kernels, dtype=dtype)
        part.transposed = linear_parts(before).transposed
        packed.append(part)
    return packed[0] if len(packed) == 1 else WQRows(packed)


def _embedding(
    checkpoint: Checkpoint,
    name: str,
    before: nn.Module,
    source: nn.Module,
    dtype: torch.dtype | None,
) -> WQEmbedding:
    """An embedding in the memory of the layer `source`."""
    shape = tuple(linear_parts(before).weight.shape)
    if not isinstance(source, PackedModule) or not is_embedding_kind(before):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is a {type(before).__name__} in the model, and in the "
            f"file it has the weight of a {type(source).__name__}: not supported"
        )
    if (source.packed.n, source.packed.k) != shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has a weight of {[source.packed.n, source.packed.k]} in "
            f"the file and of {list(shape)} in the model's config"
        )
    embedding = WQEmbedding(source, dtype=dtype or linear_parts(before).weight.dtype)
    embedding.stand_in_for(before)
    return embedding


def _unfuse_experts(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Takes apart the experts that are stored one by one."""
    dense = (tensor.removesuffix(".weight") for tensor in checkpoint.dense)
    numbers = Counter(name.rpartition(".")[0] for name in (*checkpoint.layers, *dense))
    quantized = {name.rpartition(".")[0] for name in checkpoint.layers}
    for name, fused in fused_experts(model).items():
        if name in quantized and fused.name in fused.owner._parameters:
            reason = fused.why_not()
            if reason is not None:
                raise CheckpointError(f"{checkpoint.folder}: {name} is not supported: {reason}")
            # A module is made for each, however many the config says there are.
            wanted, found = len(fused.parameter), numbers[name]
            if wanted != found:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} has {wanted} experts in the model's config, and "
                    f"{found} in the file"
                )
            unfuse(fused)


def _without_idle_bias(weight: QuantizedWeight, linear: nn.Module) -> QuantizedWeight:
    idle = linear_parts(linear).bias is None and weight.bias is not None and not weight.bias.any()
    return weight.replace(bias=None) if idle else weight


def _check_layer(
    checkpoint: Checkpoint, name: str, linear: nn.Module, weights: list[QuantizedWeight]
) -> None:
    where, parts = f"{checkpoint.folder}: {name}", linear_parts(linear)
    shape, bias = (sum(weight.n for weight in weights), weights[0].k), weights[0].bias
    if tuple(parts.weight.shape) != shape:
        raise CheckpointError(
            f"{where} is {list(shape)} in the file and {list(parts.weight.shape)} in the "
            "model's config"
        )
    if (parts.bias is None) != (bias is None):
        there, not_there = ("model", "file") if bias is None else ("file", "model")
        raise CheckpointError(f"{where} has a bias in the {there}, and none in the {not_there}")
    if len(weights) == 1:
        return
    if is_embedding_kind(linear):
        raise CheckpointError(f"{where} is an embedding whose rows are not quantized alike")
    if any(weight.k != shape[1] or (weight.bias is None) != (bias is None) for weight in weights):
        raise CheckpointError(f"{where} is made of layers with other columns, or biases in some")
    if parts.transposed:
        raise CheckpointError(
            f"{where} is made of layers that are not quantized alike, and is a "
            f"{type(linear).__name__} in the model: not supported"
        )


def _check_same(checkpoint: Checkpoint, name: str, layer: nn.Module, first: nn.Module) -> None:
    held, wanted = layer.state_dict(), first.state_dict()
    if held.keys() != wanted.keys() or not all(torch.equal(held[n], wanted[n]) for n in held):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is one layer with another by the model's code, and "
            "differs from it in the file"
        )


def is_unused(model: Any, name: str) -> bool:
    """Whether a tensor that the model has no place for changes nothing, by our list or its own."""
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return matches(name, (*UNUSED, *own))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
