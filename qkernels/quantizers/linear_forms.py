"""Weights of linear layers in other forms than `nn.Linear`, as `nn.Linear` while a model is
quantized: methods, calibration and reports know nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from qkernels.modules.experts import FusedExperts, WQExperts, fused_experts, unfuse
from qkernels.modules.kinds import is_conv1d, linear_parts, take_place_of
from qkernels.modules.linear import WQLinear


class LinearForms:
    """Makes every layer of `names` an `nn.Linear` in `model`, in the memory of its weight.

    Either `finish` or `undo` must follow.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._undo: list[Callable[[], None]] = []
        self._stacks: list[tuple[WQExperts, Callable[[], None]]] = []
        self._before: dict[str, nn.Module] = {}
        made: dict[int, nn.Linear] = {}
        fused = fused_experts(model)
        for name in names:
            stack = fused.get(name.rpartition(".")[0])
            if stack is not None and stack.name in stack.owner._parameters:
                self._take_apart(stack)
            layer = model.get_submodule(name)
            self._before[name] = layer
            if is_conv1d(layer):
                model.set_submodule(name, made.setdefault(id(layer), _as_linear(layer)))

    def _take_apart(self, fused: FusedExperts) -> None:
        owner, parameters = fused.owner, dict(fused.owner._parameters)
        experts = unfuse(fused)

        def restore() -> None:
            del owner._modules[fused.name]
            # The others are in their places still, whatever has been made of them since.
            current = dict(owner._parameters)
            owner._parameters.clear()
            owner._parameters.update(
                {n: current.get(n, p) for n, p in parameters.items() if n not in owner._modules}
            )

        self._undo.append(restore)
        self._stacks.append((experts, restore))

    def instead_of(self, name: str) -> str | None:
        """What a layer was before, where it was no nn.Linear: see `checkpoints.WeightKind`."""
        if is_conv1d(self._before[name]):
            return "a Conv1D"
        holder = self._model.get_submodule(name.rpartition(".")[0])
        return "an expert of a fused parameter" if isinstance(holder, WQExperts) else None

    def undo(self) -> None:
        """Makes the model what it was, where its layers are those that were made here."""
        for name, before in self._before.items():
            if is_conv1d(before):
                self._model.set_submodule(name, before)
        for restore in reversed(self._undo):
            restore()

    def finish(self) -> None:
        """Gives layers that have been quantized what was on those before them, and gives the others
        back their form."""
        for name, before in self._before.items():
            layer = self._model.get_submodule(name)
            if isinstance(layer, WQLinear):
                layer.transposed = is_conv1d(before)
                take_place_of(layer, before)
            elif is_conv1d(before):
                self._model.set_submodule(name, before)
        for experts, restore in self._stacks:
            dense = [layer for layer in experts.layers if not isinstance(layer, WQLinear)]
            if len(dense) == len(experts):
                restore()
                continue
            for layer in dense:
                # A view would keep the memory of all experts.
                layer.weight = nn.Parameter(
                    layer.weight.detach().clone(memory_format=torch.contiguous_format),
                    requires_grad=layer.weight.requires_grad,
                )


def _as_linear(layer: nn.Module) -> nn.Linear:
    parts = linear_parts(layer)
    n, k = parts.weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=parts.weight.dtype)
    linear.weight = nn.Parameter(parts.weight, requires_grad=False)
    linear.bias = parts.bias  # type: ignore[assignment]
    take_place_of(linear, layer)
    return linear
