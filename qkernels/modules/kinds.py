"""Which modules are linear layers, and can be replaced by one that computes the same product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

_LINEAR_CLASSES: tuple[type[nn.Module], ...] = (nn.Linear, NonDynamicallyQuantizableLinear)
"""x @ weight.T + bias, and nothing else. A subclass may compute something else, as LoRA layers and
routers do."""

_EQUIVALENTS = frozenset(
    (
        # Rounds before it adds the bias.
        ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
        # Has initial values of its own.
        ("transformers.models.esm.modeling_esmfold", "EsmFoldLinear"),
    )
)
"""Subclasses, by module and name, that were read and compute the same."""

_CONV1D = ("transformers.pytorch_utils", "Conv1D")
"""x @ weight + bias: GPT-2's linear layer, whose weight is [K, N]."""


@dataclass(frozen=True)
class LinearParts:
    """What a linear layer consists of.

    Attributes:
        weight: [N, K], a view of the layer's own.
        bias: [N] or None.
        transposed: the layer has its weight as [K, N].
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of Transformers."""
    return _class_of(module) == _CONV1D


def _class_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_linear_kind(module: nn.Module) -> bool:
    """Whether it has the class of a linear layer, or a subclass of it."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def why_not_plain(module: nn.Module) -> str | None:
    """Why another module with the same product cannot take the place of a linear layer, or None."""
    weight: Any = module._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        return "its size is not known before its first forward"
    known = type(module) in _LINEAR_CLASSES or _class_of(module) in _EQUIVALENTS
    if not known and not is_conv1d(module):
        kind = type(module).__name__
        return f"a {kind}, a subclass of nn.Linear that may compute something else"
    if "forward" in vars(module):
        if hasattr(module, "_hf_hook"):
            return (
                "accelerate has replaced its forward: take its hooks off by "
                "accelerate.hooks.remove_hook_from_submodules"
            )
        return "its forward has been replaced"
    expected = {"weight", "bias"}
    if set(module._parameters) != expected or weight is None:
        return "its weight is computed from other parameters"
    if module._buffers or any(True for _ in module.children()):
        return "it has buffers or modules of its own"
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module with the same product can take its place."""
    return is_linear_kind(module) and why_not_plain(module) is None


def linear_parts(module: nn.Module) -> LinearParts:
    """Of a module that `is_linear_kind`."""
    layer: Any = module
    weight, transposed = layer.weight.detach(), is_conv1d(module)
    return LinearParts(weight.t() if transposed else weight, layer.bias, transposed)


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def take_place_of(module: nn.Module, before: nn.Module, *, attributes: bool = True) -> None:
    """Gives `module` what others have put on the layer whose place it takes.

    These are its hooks, in the same dictionaries, so that handles still remove them; whether it
    trains; and, where `attributes`, those that are neither the layer's own nor private.
    """
    for name in _HOOKS:
        vars(module)[name] = vars(before)[name]
    module._is_full_backward_hook = before._is_full_backward_hook
    module.training = before.training
    for name, value in vars(before).items() if attributes else ():
        if not name.startswith("_") and not hasattr(module, name):
            setattr(module, name, value)


def become(module: nn.Module, other: nn.Module) -> None:
    """Makes `module`, wherever it is held, the same as `other`."""
    module.__class__ = type(other)
    vars(module).clear()
    vars(module).update(vars(other))
