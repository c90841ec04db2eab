"""`WQExperts`: a layer for each expert, in place of the one parameter that holds all of them.

Mixtures of experts in Transformers 5 have their weights fused: a parameter [E, N, K] (or [E, K, N])
a projection. Taken apart, each expert is a linear layer like any other, which methods calibrate and
formats name; and the model's own code goes on using the whole as if it were the parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qkernels.errors import LayerError
from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import scale_all
from qkernels.modules.stacks import Stack, product_by_number, why_not_stacked
from qkernels.modules.view import NUMBERS, Source, StackSource, WeightView

_MOST_UNUSED = 4
"""How many stacks in a row may be made and not found again, as where each call comes with other
buffers, before layers run one by one."""


def expert_name(number: int) -> str:
    """The name of an expert's layer in its `WQExperts`.

    No bare number: tools that look for the ends of names, as PEFT does, would find blocks by it.
    """
    return f"expert_{number}"


class WQExperts(nn.Module):
    """E linear layers [N, K] without biases, quantized or not: expert_0, expert_1, ...

    Code that treats it as the parameter it stands for gets a `WeightView`: `experts[e]` in
    `F.linear` or `@`, and the whole, or experts picked by a tensor, in `torch.bmm` and
    `F.grouped_mm`, run the layers; an expert that no token reached costs nothing. Whatever else
    needs values gets them dequantized.

    Where all layers are alike, products with several of them are one call of `ops.linear_grouped`:
    from the first on, the layers' buffers are slices of one tensor each (`stacks.Stack`). Hooks,
    adapters and whatever else is put on a layer count: then, or where layers differ, each is called
    as a module with its rows.

    Attributes:
        transposed: the parameter is [E, K, N].
    """

    _stack: Stack | None = None
    _unused = 0

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
        """What stands for the parameter.

        While torch.compile traces, and the layers make a stack, something that it can follow.
        """
        if torch.compiler.is_compiling() and self._has_stack_while_traced():
            return cast(WeightView, _Traced(self, self.transposed))
        return self._view()

    def _view(self) -> WeightView:
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

    def view_grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """For `WeightView`."""
        stack = self._find_stack()
        if stack is not None:
            return stack.product(x, ends)
        stops = ends.tolist()
        layers = self.layers
        parts = [
            layers[e](x[start:stop])
            for e, (start, stop) in enumerate(zip([0, *stops[:-1]], stops, strict=True))
            if stop > start
        ]
        like = parts[0] if parts else x  # layers may give another type than they are given
        return torch.cat([*parts, like.new_zeros(len(x) - stops[-1], layers[0].out_features)])

    def view_batched(self, x: Tensor) -> Tensor:
        """For `WeightView`."""
        stack = self._find_stack()
        if stack is not None:
            return stack.batched(x)
        return torch.stack([layer(rows) for layer, rows in zip(self.layers, x, strict=True)])

    def view_gathered(self, numbers: Tensor) -> StackSource:
        """For `WeightView`."""
        return _Picked(self, numbers)

    def _find_stack(self) -> Stack | None:
        """The layers as a stack, or None where they do not make one."""
        if torch.compiler.is_compiling():
            return self._stack if self._has_stack_while_traced() else None
        return self._held_stack()

    def _has_stack_while_traced(self) -> bool:
        """Whether there is a stack. It is looked for, or made, while a compiler traces alone."""
        return self._held_stack() is not None

    # What torch.compiler.assume_constant_result does, which imports Triton.
    _has_stack_while_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _held_stack(self) -> Stack | None:
        """The stack, made where there is none, or none that holds."""
        layers = self.layers
        if self._stack is not None and not self._stack.holds(layers):
            self._stack = None
        if self._stack is not None and self._stack.is_bare():
            self._unused = 0
            return self._stack
        if why_not_stacked(layers) is not None:
            return None
        if self._stack is not None:
            self._stack.look_again()
        elif self._unused < _MOST_UNUSED:
            self._unused += 1
            self._stack = Stack(cast(list[WQLinear], layers))
        return self._stack

    def _load_from_state_dict(self, *args: Any) -> None:
        # Buffers may be replaced, which compiled code does not look for.
        self._stack = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Any, recurse: bool = True) -> WQExperts:
        super()._apply(fn, recurse)
        self._unused = 0
        if self._stack is not None and not self._stack.holds(self.layers):
            self._stack = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy's layers have memory of their own.
        return {**vars(self), "_stack": None}

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


def _counted(numbers: Tensor, experts: int) -> Tensor:
    """Numbers, of which those below 0 count from the end."""
    return torch.where(numbers < 0, numbers + experts, numbers)


@dataclass(frozen=True)
class _Picked:
    """Experts by numbers [S], of which each may be there several times, or not at all."""

    experts: WQExperts
    numbers: Tensor

    def view_values(self) -> Tensor:
        present, places = self._counted().unique(return_inverse=True)
        values = [self.experts.view_entry(number).view_values() for number in present.tolist()]
        return torch.stack(values)[places]

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        raise AssertionError("a stack is multiplied entry by entry")

    def view_entry(self, number: int) -> Source:
        return self.experts.view_entry(int(self._counted()[number]))

    def view_scale(self, factor: float) -> None:
        raise LayerError(
            f"experts picked by a tensor are not multiplied in place by {factor}: multiply what is "
            "computed with them"
        )

    def view_grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        stops = ends.tolist()
        starts = [0, *stops[:-1]]
        rows = [x.new_zeros(len(x) - stops[-1], self.experts.layers[0].out_features)]
        for number, start, stop in zip(self._counted().tolist(), starts, stops, strict=True):
            if stop > start:
                rows.insert(-1, self.experts.view_entry(number).view_product(x[start:stop], None))
        return torch.cat(rows)

    def view_batched(self, x: Tensor) -> Tensor:
        numbers = self._counted()
        return product_by_number(self.experts.view_grouped, x, numbers, len(self.experts))

    def view_gathered(self, numbers: Tensor) -> StackSource:
        return _Picked(self.experts, self.numbers[numbers])

    def _counted(self) -> Tensor:
        """The numbers, counted from the first expert on."""
        experts, numbers = len(self.experts), self.numbers
        if numbers.device.type == "cpu" and not ((-experts <= numbers) & (numbers < experts)).all():
            raise IndexError(f"an index is out of range for {experts} experts")
        return _counted(numbers, experts)


class _Traced:
    """A `WeightView` of a stack, or of experts picked of it, as torch.compile can follow it.

    Batched products are calls of the operator, and so are grouped ones where compilers say that
    they meet one: `F.grouped_mm` is none of those functions, and ends the graph. All else is done
    by a view, which ends it too.
    """

    def __init__(self, experts: WQExperts, transposed: bool, numbers: Tensor | None = None) -> None:
        self.experts, self.transposed, self.numbers = experts, transposed, numbers

    @property
    def dtype(self) -> torch.dtype:
        return cast(WQLinear, self.experts.layers[0]).dtype

    @property
    def device(self) -> torch.device:
        return self._stack.buffers[0].device

    @property
    def _stack(self) -> Stack:
        stack = self.experts._stack
        assert stack is not None
        return stack

    @property
    def mT(self) -> _Traced:
        return _Traced(self.experts, not self.transposed, self.numbers)

    def transpose(self, dim0: int, dim1: int) -> Any:
        if {dim0 % 3, dim1 % 3} == {1, 2}:
            return self.mT
        return self.view().transpose(dim0, dim1)

    def __getitem__(self, index: Any) -> Any:
        picks = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in NUMBERS
        if picks and self.numbers is None:
            return _Traced(self.experts, self.transposed, index)
        return self.view()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("experts", "transposed", "numbers"):
            # Compilers look at an object before it has attributes.
            raise AttributeError(name)
        return getattr(self.view(), name)

    def view(self) -> WeightView:
        view = self.experts._view()
        view = view if self.transposed is self.experts.transposed else view.turned()
        return view if self.numbers is None else view.gathered(self.numbers)

    def batched(self, x: Tensor) -> Tensor:
        """y [S, T, N] of x [S, T, K]."""
        if self.numbers is None:
            return self._stack.batched(x)
        experts = len(self.experts)
        numbers = _counted(self.numbers, experts)
        return product_by_number(self._stack.product, x, numbers, experts)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if len(args) == 2:
            first, second = args
            whole = isinstance(second, _Traced) and second.numbers is None
            if whole and second.transposed and list(kwargs) == ["offs"]:
                return second._stack.product(first, kwargs["offs"])
            if func is torch.bmm and not kwargs:
                if isinstance(second, _Traced) and second.transposed:
                    return second.batched(first)
                if isinstance(first, _Traced) and not first.transposed:
                    return first.batched(second.mT).mT
        return func(*tree_map(_as_view, args), **tree_map(_as_view, kwargs))


def _as_view(argument: Any) -> Any:
    return argument.view() if isinstance(argument, _Traced) else argument


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
