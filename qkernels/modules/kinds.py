"""Which modules are linear layers or embeddings, and can be replaced by one that computes the
same."""

from __future__ import annotations

import inspect
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

_SCALED = (
    "return super().forward(input_ids) * self.embed_scale",
    "return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)",
)
"""What embeddings of Transformers compute that multiply their rows by a number, as Gemma's do."""

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
    return _why_not_own_weight(module, {"weight", "bias"}, frozenset())


def _why_not_own_weight(
    module: nn.Module, expected: set[str], buffers: frozenset[str]
) -> str | None:
    """Why its forward is not that of its class with these parameters and buffers, or None."""
    weight: Any = module._parameters.get("weight")
    if "forward" in vars(module):
        if hasattr(module, "_hf_hook"):
            return (
                "accelerate has replaced its forward: take its hooks off by "
                "accelerate.hooks.remove_hook_from_submodules"
            )
        return "its forward has been replaced"
    if set(module._parameters) != expected or weight is None:
        return "its weight is computed from other parameters"
    if not buffers.issuperset(module._buffers) or any(True for _ in module.children()):
        return "it has buffers or modules of its own"
    if not isinstance(weight, nn.Parameter) or type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module with the same product can take its place."""
    return is_linear_kind(module) and why_not_plain(module) is None


def is_embedding_kind(module: nn.Module) -> bool:
    """Whether it has the class of an embedding, or a subclass of it."""
    return isinstance(module, nn.Embedding)


def why_not_plain_embedding(module: nn.Module) -> str | None:
    """Why another module with the same rows cannot take the place of an embedding, or None."""
    if type(module) is not nn.Embedding and not _multiplies_rows(type(module)):
        kind = type(module).__name__
        return f"a {kind}, a subclass of nn.Embedding that may compute something else"
    if getattr(module, "max_norm", None) is not None:
        return "it shortens rows of its weight when they are looked up (max_norm)"
    return _why_not_own_weight(module, {"weight"}, frozenset(("embed_scale",)))


def _multiplies_rows(kind: type[nn.Module]) -> bool:
    """Whether it is an embedding of Transformers that multiplies its rows by `embed_scale`."""
    module, name = kind.__module__, kind.__name__
    if not module.startswith("transformers.models.") or not name.endswith("ScaledWordEmbedding"):
        return False
    try:
        source = inspect.getsource(kind.forward)
    except OSError:
        # Installed without its source.
        return False
    return source.split(":", 2)[-1].strip() in _SCALED


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether a module with the same rows can take its place."""
    return is_embedding_kind(module) and why_not_plain_embedding(module) is None


def linear_parts(module: nn.Module) -> LinearParts:
    """Of a module that `is_linear_kind`, or of an embedding."""
    layer: Any = module
    weight, transposed = layer.weight.detach(), is_conv1d(module)
    bias = getattr(layer, "bias", None)
    return LinearParts(weight.t() if transposed else weight, bias, transposed)


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
