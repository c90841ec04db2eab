"""Quantizes a model while its weights are read, each as it comes, so that they are never all there.

For methods that look at one weight alone. The others need the model: `quantize_model`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import rounding
from qkernels.checkpoints.format import WeightKind
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.modules.experts import FusedExperts, fused_experts, unfuse
from qkernels.modules.kinds import is_conv1d, take_place_of
from qkernels.modules.linear import WQLinear
from qkernels.quantizers.embeddings import EmbeddingForms
from qkernels.quantizers.making import build_layer, planned_kind
from qkernels.quantizers.method import LayerTask
from qkernels.quantizers.plan import LayerPlan
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.report import LayerReport, QuantizationReport, compare


def takes_weights_alone(recipe: Recipe, plan: LayerPlan) -> bool:
    """Whether a recipe quantizes each layer by its weight, and nothing else of the model."""
    (*others, last) = recipe.parts
    if others or last.method.quantize is None or last.method.prepares:
        return False
    static = any(s.activation.is_static for s in plan.schemes.values())
    asks = any(last.method.statistics(scheme, last.parameters) for scheme in plan.schemes.values())
    return not (static or asks)


@dataclass(frozen=True)
class _Place:
    """Where a layer is in a model: a module, or an entry of a fused parameter.

    Attributes:
        parameter: the name of the parameter with its weight.
    """

    parameter: str
    module: nn.Module
    fused: FusedExperts | None = None
    number: int = 0

    @property
    def key(self) -> tuple[int, str, int]:
        """The same for a layer under all of its names."""
        return (id(self.module), "" if self.fused is None else self.fused.name, self.number)

    def weight_of(self, parameter: Tensor) -> Tensor:
        """[N, K], a view."""
        if self.fused is not None:
            entry = parameter[self.number]
            return entry.t() if self.fused.transposed else entry
        return parameter.t() if is_conv1d(self.module) else parameter


class IncomingLayers:
    """The layers of a model that are quantized as their weights come."""

    def __init__(
        self,
        model: nn.Module,
        plan: LayerPlan,
        recipe: Recipe,
        *,
        backend: str | None = None,
        check_kernels: bool = True,
        tied: Collection[str] = (),
    ) -> None:
        """
        Args:
            model: its parameters may be on the meta device.
            recipe: one that `takes_weights_alone`.
            tied: names of parameters that are to be made one with others, which are quantized when
                they are.
        """
        self._model, self._plan, self._recipe = model, plan, recipe
        self._options = {"backend": backend, "check_kernels": check_kernels}
        self._fused = fused_experts(model)
        self._places = {name: self._place(name) for name in plan.schemes}
        self._tied = frozenset(tied)
        self._names: dict[str, list[str]] = {}
        for name, place in self._places.items():
            self._names.setdefault(place.parameter, []).append(name)
        self._made: dict[tuple[int, str, int], tuple[WQLinear, LayerReport]] = {}
        self._dense: dict[str, Tensor] = {}

    def _place(self, name: str) -> _Place:
        stack, _, entry = name.rpartition(".")
        fused = self._fused.get(stack)
        if fused is not None:
            return _Place(stack, fused.owner, fused, int(entry.rpartition("_")[2]))
        return _Place(f"{name}.weight", self._model.get_submodule(name))

    def kinds(self) -> dict[str, WeightKind]:
        """What is known of the linear layers, by name."""
        found = {}
        for name, place in self._places.items():
            n, k = place.weight_of(self._model.get_parameter(place.parameter)).shape
            other = "an expert of a fused parameter" if place.fused is not None else None
            found[name] = planned_kind(
                self._plan.schemes[name],
                self._recipe.quantizing,
                (n, k),
                "a Conv1D" if is_conv1d(place.module) else other,
            )
        return found

    def wants(self, parameter: str) -> bool:
        """Whether a parameter of that name is to be given to `take`, and not to the model."""
        return parameter in self._names and parameter not in self._tied

    def bits(self, parameter: str) -> float | None:
        """About how many bits each number of a parameter takes here; None for one left alone."""
        names = self._names.get(parameter)
        if names is None or parameter in self._tied:
            return None
        return max(self._plan.schemes[name].weight.bits for name in names)

    def take(self, parameter: str, values: Tensor) -> None:
        """Quantizes the layers that a parameter has the weights of.

        Args:
            values: of the parameter's shape, on the device that the layers are to be on.

        Raises:
            WeightError, SchemeError, NoKernelError: naming the layer.
        """
        for name in self._names[parameter]:
            self._make(name, self._places[name].weight_of(values))
        if parameter in self._fused:
            # Of a stack some of whose experts stay as they are.
            planned = {self._places[name].number for name in self._names[parameter]}
            if len(planned) < len(values):
                self._dense[parameter] = values
        give_back_free_pages()

    def _make(self, name: str, weight: Tensor) -> None:
        key, scheme, part = (
            self._places[name].key,
            self._plan.schemes[name],
            self._recipe.quantizing,
        )
        if key in self._made:
            return
        weight = weight.detach()
        rounding.check_weight(weight, f"{name}.weight")
        task = LayerTask(name, weight, None, scheme, inputs=None, activation_scale=None)
        made = build_layer(task, part, self._options)
        report = compare(name, _linear(weight), made, None, str(part))
        self._made[key] = made, report

    def finish(self) -> QuantizationReport:
        """Puts the layers in their places, with their biases, which the model has by now, and
        quantizes embeddings.

        Raises:
            WeightError, SchemeError, NoKernelError: of a layer whose weight came to the model.
        """
        model, reports = self._model, {}
        for name, place in self._places.items():
            if place.key not in self._made:
                self._make(name, place.weight_of(model.get_parameter(place.parameter)))
        embeddings = EmbeddingForms(model, self._plan.embeddings)
        stacks = {place.parameter for place in self._places.values() if place.fused is not None}
        for stack in stacks:
            self._take_apart(stack)
        for name, place in self._places.items():
            layer, report = self._made[place.key]
            reports[name] = replace(report, name=name)
            before: Any = model.get_submodule(name)
            # A block that has several names has its layers by now.
            if before is not layer:
                layer.bias = None if before.bias is None else before.bias.detach()
                layer.transposed = is_conv1d(before)
                take_place_of(layer, before)
                model.set_submodule(name, layer)
        reports |= embeddings.put(reports)
        return QuantizationReport(
            str(self._recipe),
            list(reports.values()),
            skipped=self._plan.skipped,
            shares=self._plan.shares,
        )

    def _take_apart(self, stack: str) -> None:
        fused = self._fused[stack]
        if fused.name not in fused.owner._parameters:
            # The same under another name.
            return
        values = self._dense.pop(stack, None)
        if values is not None:
            fused.owner._parameters[fused.name] = nn.Parameter(values)
        planned = {self._places[name].number for name in self._names[stack]}
        for number, layer in enumerate(unfuse(fused).layers):
            if number not in planned:
                # A view would keep the memory of all experts.
                copy = layer.weight.detach().clone(memory_format=torch.contiguous_format)
                layer.weight = nn.Parameter(copy)


def _linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
