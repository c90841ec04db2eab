"""The quantized layers of a model, and the tensors outside of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from qkernels.modules.packed import PackedModule


@dataclass(frozen=True)
class Place:
    """Where a module has a parameter or a buffer."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        held: Tensor = getattr(self.module, self.name)
        return held


def quantized_layers(model: nn.Module) -> dict[str, PackedModule]:
    """The `WQLinear` layers and `WQEmbedding`s of a model by name; one with several names is there
    under each."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, PackedModule)}


def sharing(layers: Mapping[str, PackedModule]) -> dict[str, str]:
    """Embeddings of `layers` that have the weight of another one -> the name of that."""
    firsts: dict[int, str] = {}
    found = {}
    for name, layer in layers.items():
        if getattr(layer, "source", None) is None:
            firsts.setdefault(id(layer), name)
    for name, layer in layers.items():
        source = getattr(layer, "source", None)
        # Of a model without the other, the first has it.
        first = name if source is None else firsts.setdefault(id(source), name)
        if first != name and source is not None:
            found[name] = first
    return found


def dense_places(model: nn.Module) -> dict[str, Place]:
    """Name -> place of each tensor that a model saves beside its quantized layers.

    A tensor with several names is there under each, in the order of the model.
    """
    places = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            continue
        unsaved = module._non_persistent_buffers_set
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and name not in unsaved:
                    places[f"{prefix}.{name}" if prefix else name] = Place(module, name)
    return places


def replace_tensor(places: list[Place], tensor: Tensor) -> None:
    """Puts `tensor` at all of `places`, which share one: a parameter where one is now."""
    current = places[0].tensor
    if isinstance(current, nn.Parameter):
        grad = current.requires_grad and tensor.is_floating_point()
        tensor = nn.Parameter(tensor, requires_grad=grad)
    for place in places:
        setattr(place.module, place.name, tensor)
