"""`WQExperts`: a layer for each expert, in place of the one parameter that holds all of them.

Mixtures of experts in Transformers 5 have their weights fused: a parameter [E, N, K] (or [E, K, N])
a projection. Taken apart, each expert is a linear layer like any other, which methods calibrate and
formats name; and the model's own code goes on using the whole as if it were the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qkernels.modules.packed import scale_all
from qkernels.modules.view import Source, WeightView


def expert_name(number: int) -> str:
    """The name of an expert's layer in its `WQExperts`.

    No bare number: tools that look for the ends of names, as PEFT does, would find blocks by it.
    """
    return f"expert_{number}"


class WQExperts(nn.Module):
    """E linear layers [N, K] without biases, quantized or not: expert_0, expert_1, ...

    Code that treats it as the parameter it stands for gets a `WeightView`: `experts[e]` in
    `F.linear` or `@`, and the whole in `torch.bmm` and `F.grouped_mm`, run the layers; an expert
    that no token reached costs nothing. Whatever else needs values gets them dequantized.

    Attributes:
        transposed: the parameter is [E, K, N].
    """

    def __init__(self, layers: Iterable[nn.Linear], transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        for number, layer in enumerate(layers):
            self.add_module(expert_name(number), layer)

    @property
    def layers(self) -> list[nn.Linear]:
        """In their order."""
        return list(self._modules.values())  # type: ignore[arg-type]

    @property
    def weight(self) -> WeightView:
        """What stands for the parameter."""
        first = self.layers[0]
        shape = (len(self.layers), first.out_features, first.in_features)
        weight = first.weight
        return WeightView(self, shape, weight.dtype, weight.device, self.transposed)

    def view_values(self) -> Tensor:
        """For `WeightView`: [E, N, K]."""
        values = [
            layer.weight.values() if isinstance(layer.weight, WeightView) else layer.weight
            for layer in self.layers
        ]
        return torch.stack(values)

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For `WeightView`."""
        raise AssertionError("a stack is multiplied entry by entry")

    def view_scale(self, factor: float) -> None:
        """For `WeightView`: multiplies every expert in place, or none."""
        scale_all(self.layers, factor)

    def view_entry(self, number: int) -> Source:
        """For `WeightView`."""
        return _Expert(self.layers[number])

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    def __iter__(self) -> Iterator[Tensor]:
        return (self.weight[number] for number in range(len(self)))

    def __matmul__(self, other: Tensor) -> Tensor:
        return torch.matmul(self.weight, other)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(torch.Tensor, name):
                raise
        return getattr(self.weight, name)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def as_weight(argument: Any) -> Any:
            return argument.weight if isinstance(argument, WQExperts) else argument

        return func(*tree_map(as_weight, args), **tree_map(as_weight, kwargs or {}))

    def extra_repr(self) -> str:
        return f"transposed={self.transposed}"


@dataclass(frozen=True)
class _Expert:
    """One of the layers, called as a module so that whatever is put on it counts."""

    layer: nn.Linear

    def view_values(self) -> Tensor:
        weight = self.layer.weight
        return weight.values() if isinstance(weight, WeightView) else weight

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.layer(x)
        return y if bias is None else y + bias

    def view_entry(self, number: int) -> Source:
        raise AssertionError("one expert has no entries")

    def view_scale(self, factor: float) -> None:
        self.layer.weight.mul_(factor)


@dataclass(frozen=True)
class FusedExperts:
    """A parameter that holds the weights of all experts of a layer.

    Attributes:
        owner: the module that has it, under `name`.
        transposed: it is [E, K, N]; None where nothing tells.
    """

    owner: nn.Module
    name: str
    transposed: bool | None

    @property
    def parameter(self) -> nn.Parameter:
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    def why_not(self) -> str | None:
        """Why it cannot be taken apart, or None."""
        if self.transposed is None:
            return (
                f"experts of a {type(self.owner).__name__}: nothing tells which of their two "
                "dimensions is the input"
            )
        return None


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """All fused experts of a model by the names of their parameters."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, FusedExperts] = {}
    for name, module in modules.items():
        around = [modules[outer] for outer in outward(name)]
        for fused in _of_module(module, around):
            found[f"{name}.{fused.name}".lstrip(".")] = fused
    return found


def outward(name: str) -> Iterator[str]:
    """The name, and those of all modules that it is inside of."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _of_module(module: nn.Module, around: Sequence[nn.Module]) -> list[FusedExperts]:
    """The fused experts that `module` itself has; `around` are it and the modules it is in."""
    marked = isinstance(getattr(module, "is_transposed", None), bool)
    if not marked and "experts" not in type(module).__name__.lower():
        return []
    stacks = {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and parameter.is_floating_point()
    }
    if marked:
        transposed: bool | None = module.is_transposed  # type: ignore[assignment]
    else:
        shapes = {name: parameter.shape for name, parameter in stacks.items()}
        transposed = _orientation(module, around, shapes)
    return [FusedExperts(module, name, transposed) for name in stacks]


_INPUT_SIZES, _OUTPUT_SIZES = ("in_features", "input_size"), ("out_features", "output_size")
_HIDDEN_SIZES = ("hidden_size", "hidden_dim", "d_model")
_DOWN = re.compile(r"(^|_)(down|out|output|w2|fc2|wo)(_|$)")
"""Projections back to the hidden size; all others start from it."""


def _orientation(
    module: nn.Module, around: Sequence[nn.Module], shapes: Mapping[str, Sequence[int]]
) -> bool | None:
    """Whether a module's stacks are [E, K, N], by the sizes that it remembers; None if unknown."""
    # The module itself may call something else its hidden size than the model's config does.
    places = [module, *(getattr(outer, "config", None) for outer in around)]
    hidden = _first(places, _HIDDEN_SIZES)
    sizes = _first([module], _INPUT_SIZES), _first([module], _OUTPUT_SIZES)
    votes = set()
    for name, (_, rows, columns) in shapes.items():
        if None not in sizes:
            ways = {way for way in (True, False) if sizes == _ends(rows, columns, way)}
        else:
            side = 1 if _DOWN.search(name) else 0
            ways = {way for way in (True, False) if _ends(rows, columns, way)[side] == hidden}
        # A square stack goes either way, and leaves the answer to the others.
        votes |= ways if len(ways) == 1 else set()
    return votes.pop() if len(votes) == 1 else None


def _ends(rows: int, columns: int, transposed: bool) -> tuple[int, int]:
    """Input and output size."""
    return (rows, columns) if transposed else (columns, rows)


def _first(places: Sequence[object], names: Sequence[str]) -> int | None:
    """The first of the sizes of these names that the places have, one after the other."""
    found = (getattr(place, name, None) for place in places for name in names)
    return next((size for size in found if isinstance(size, int)), None)


def unfuse(fused: FusedExperts) -> WQExperts:
    """Puts a `WQExperts` of layers that share the parameter's memory in its place."""
    assert fused.transposed is not None
    parameter = fused.parameter
    layers = []
    for weight in parameter.detach():
        weight = weight.t() if fused.transposed else weight
        n, k = weight.shape
        layer = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
        layer.weight = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        layer.training = fused.owner.training
        # Where Transformers draws new weights, those of experts count as filled.
        vars(layer)["_is_hf_initialized"] = True
        layers.append(layer)
    experts = WQExperts(layers, fused.transposed)
    experts.training = fused.owner.training
    del fused.owner._parameters[fused.name]
    fused.owner.add_module(fused.name, experts)
    return experts
