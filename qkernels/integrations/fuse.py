"""`fuse`: the quantized layers of a model that read the same as one product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.calibration.forwards import run_batch
from qkernels.calibration.observe import calibrating
from qkernels.calibration.synthetic import random_tokens, why_no_tokens
from qkernels.errors import LayerError
from qkernels.modules import WQLinear
from qkernels.modules.fused import Fused, FusedPart, why_not_fused


@dataclass(frozen=True)
class FuseReport:
    """Attributes:
    fused: the names of the layers of each group.
    left: names of layers that read the same -> why they are not one product.
    """

    fused: list[tuple[str, ...]]
    left: dict[tuple[str, ...], str]


def fuse(model: nn.Module, example: Any = None) -> FuseReport:
    """Makes the quantized layers of `model` that read the same x one product, in place.

    These are projections to queries, keys and values, or to a gate and what it gates, whatever the
    architecture: the model is run once to see who reads what. Each x is then quantized, and its
    weights are gone through, once instead of three times. Outputs are the same, bit for bit; layers
    keep their names, their weights and what is saved of them; `unfuse` takes it back, and so does
    moving the model to another device.

    Args:
        example: a batch to run (a tensor, or a tuple or dict of the model's arguments); None is a
            few tokens drawn at random.

    Raises:
        LayerError: for a model without quantized layers, or one that embeds no tokens where there
            is no example.
    """
    layers = {
        id(module): (name, module)
        for name, module in reversed(list(model.named_modules()))
        if type(module) is WQLinear
    }
    if not layers:
        raise LayerError("the model has no WQLinear that is not fused already: quantize it first")
    if example is None:
        reason = why_no_tokens(model)
        if reason is not None:
            raise LayerError(f"a {type(model).__name__} {reason}: give an example batch")
        example = random_tokens(model, sequences=1, length=8)[0]
    report = FuseReport([], {})
    for group in _readers(model, {key: module for key, (_, module) in layers.items()}, example):
        names = tuple(layers[id(layer)][0] for layer in group)
        reason = why_not_fused(group)
        if reason is None:
            Fused(group, names)
            report.fused.append(names)
        elif len(group) > 1:
            report.left[names] = reason
    return report


def unfuse(model: nn.Module) -> None:
    """Takes back what `fuse` did: each layer has memory of its own again."""
    for module in list(model.modules()):
        if isinstance(module, FusedPart):
            module._fused[0].dissolve()


def _readers(model: nn.Module, layers: dict[int, WQLinear], example: Any) -> list[list[WQLinear]]:
    """Layers by the tensor that they are given, in the order of calls; of those that run once."""
    calls: list[tuple[WQLinear, Tensor]] = []

    def note(layer: WQLinear) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            # The tensors are held, so that no two of them are one by chance.
            calls.append((layer, args[0]))

        return before

    hooks = [layer.register_forward_pre_hook(note(layer)) for layer in layers.values()]
    try:
        with calibrating(model), torch.no_grad():
            run_batch(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    often: dict[int, int] = {}
    for layer, _ in calls:
        often[id(layer)] = often.get(id(layer), 0) + 1
    groups: dict[int, list[WQLinear]] = {}
    for layer, x in calls:
        if often[id(layer)] == 1:
            groups.setdefault(id(x), []).append(layer)
    return list(groups.values())
