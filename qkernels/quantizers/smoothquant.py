"""SmoothQuant: large columns of inputs are made smaller, and those of the weight larger.

    (x diag(1/s)) (W diag(s))^T,    s = max|x|^alpha / max|w|^(1 - alpha)

with the largest magnitudes of each column (Xiao et al. 2023, equation 4). 1/s goes into what is in
front, a norm or the rows of a linear layer; what nothing in front can take, the quantized layer
keeps as a factor of its input. `steps` searches alpha for each layer, or layers that read the same,
for the least error of the output on a sample of rows, with activations and weights rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import rounding
from qkernels.calibration.ranges import Numbers, rounded, scale_and_zero
from qkernels.calibration.statistics import Needs
from qkernels.modules.fake_quant import dynamically_rounded
from qkernels.quantizers.method import BlockTask, Method, why_no_rounded_activations
from qkernels.quantizers.producers import around_one, consumers_of, neighbours_of
from qkernels.scheme import QuantScheme

_LEAST = 1e-5
"""Of magnitudes, as the paper's code has it."""


@dataclass(frozen=True)
class SmoothQuantParameters:
    """Attributes:
    alpha: how much of the difficulty goes from inputs to weights, in [0, 1].
    steps: how many alphas, evenly spaced in [0, 1], are tried for each layer in place of `alpha`,
        beside no factor at all; 0 tries none.
    fold: only where something in front takes the factor, so that layers have none of their own,
        which other formats do not hold.
    """

    alpha: float = 0.5
    steps: int = 0
    fold: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha:g}")
        if self.steps < 0 or self.steps == 1:
            raise ValueError(f"steps must be 0, or 2 and more, got {self.steps}")


def _statistics(scheme: QuantScheme, parameters: SmoothQuantParameters) -> Needs:
    if scheme.weight_only:
        return Needs()
    return Needs(quantized=("largest", "rows") if parameters.steps else ("largest",))


def _prepare(task: BlockTask, parameters: SmoothQuantParameters) -> None:
    left = {
        name
        for name, scheme in task.schemes.items()
        if not scheme.weight_only and name in task.inputs and task.inputs[name].rows
    }
    for found in neighbours_of(task):
        names = [name for name in consumers_of(task, found) if name in left]
        if not names:
            continue
        left.difference_update(names)
        columns = found.channels.to(task.layers[names[0]].weight.device)
        factor = _Smoothed(task, names, columns, found.count).factor(parameters)
        if factor is not None:
            for name, values in found.rewritten(task.module, factor):
                task.rewrite(name, values)
    if parameters.fold:
        return
    for names in _readers_of_one(task, left):
        layer = task.layers[names[0]]
        columns = torch.arange(layer.in_features, device=layer.weight.device)
        factor = _Smoothed(task, names, columns, layer.in_features).factor(parameters)
        for name in names if factor is not None else ():
            assert factor is not None
            task.scale_inputs(name, 1 / factor)


def _readers_of_one(task: BlockTask, names: set[str]) -> list[list[str]]:
    """Layers by what they read, such as queries, keys and values, so that they have one factor and
    share what is rounded: those whose inputs have the same largest magnitudes, column by column."""
    found: dict[tuple[float, ...], list[str]] = {}
    seen: set[int] = set()
    for name, layer in task.layers.items():
        # A layer may have several names.
        if name in names and id(layer) not in seen:
            seen.add(id(layer))
            largest = task.inputs[name].quantized["largest"].values
            found.setdefault(tuple(largest.tolist()), []).append(name)
    return list(found.values())


class _Smoothed:
    """Layers that read the same, and which of `count` numbers their columns are."""

    def __init__(self, task: BlockTask, names: list[str], columns: Tensor, count: int) -> None:
        self._columns, self._count = columns, count
        self._layers = [_Layer(task, name) for name in names]

    def factor(self, parameters: SmoothQuantParameters) -> Tensor | None:
        """What the weights' columns are multiplied by, fp32 [count]; None where nothing is better
        than no factor."""
        if not parameters.steps:
            return self._at(parameters.alpha)
        best, least = None, self._loss(torch.ones_like(self._inputs))
        for factor in self._tried(parameters.steps):
            loss = self._loss(factor)
            if loss < least:
                best, least = factor, loss
        return best

    def _tried(self, steps: int) -> Iterator[Tensor]:
        for step in range(steps):
            yield self._at(step / (steps - 1))

    def _at(self, alpha: float) -> Tensor:
        factor = self._inputs**alpha / self._weights ** (1 - alpha)
        return around_one(factor)

    def _loss(self, factor: Tensor) -> float:
        return sum(layer.loss(factor[self._columns]) for layer in self._layers)

    @cached_property
    def _inputs(self) -> Tensor:
        return self._largest([layer.inputs for layer in self._layers])

    @cached_property
    def _weights(self) -> Tensor:
        return self._largest([layer.weight.abs().amax(dim=0).float() for layer in self._layers])

    def _largest(self, of_columns: list[Tensor]) -> Tensor:
        """Over layers, and over the columns that are one number."""
        found = torch.zeros(self._count, device=self._columns.device)
        for values in of_columns:
            found.scatter_reduce_(0, self._columns, values.to(found), "amax")
        return found.clamp_(min=_LEAST)


class _Layer:
    """Attributes: weight: [N, K]; inputs: the largest |x| of each column, fp32 [K]."""

    def __init__(self, task: BlockTask, name: str) -> None:
        self.weight, self._scheme = task.layers[name].weight.detach(), task.schemes[name]
        seen = task.inputs[name].quantized
        self.inputs = seen["largest"].values
        self._rows: Tensor | None = seen["rows"].rows.float() if "rows" in seen else None

    def loss(self, factor: Tensor) -> float:
        """|y - y_q|^2 / |y|^2 on the sampled rows, with columns of the weight times `factor`."""
        assert self._rows is not None
        x = self._rounded_inputs(self._rows / factor, self.inputs / factor)
        # Weights are rounded alike whatever the scale and the zero point of static activations.
        fake = rounding.quantize(self.weight.float() * factor, self._scheme.dynamic)
        wrong = F.linear(x, fake.dequantize()) - self._exact
        return float(wrong.square().sum()) / max(float(self._exact.square().sum()), 1e-30)

    @cached_property
    def _exact(self) -> Tensor:
        assert self._rows is not None
        return F.linear(self._rows, self.weight.float())

    def _rounded_inputs(self, x: Tensor, largest: Tensor) -> Tensor:
        """x as the layer will multiply it; one scale for all tokens is that of all batches."""
        activation, numbers = self._scheme.activation, Numbers.of(self._scheme.activation)
        if activation.granularity in ("token", "tokenasym"):
            return dynamically_rounded(x, self._scheme)
        if activation.by_position:
            # The sampled rows are of all positions: a token's own scale is nearest to that of its.
            per_token = activation.granularity.replace("position", "token")
            own = replace(activation, granularity=per_token)
            return dynamically_rounded(x, replace(self._scheme, activation=own))
        scale, zero = scale_and_zero(-largest.max(), largest.max(), numbers)
        return rounded(x, scale, zero, numbers)


SMOOTHQUANT = Method(
    name="smoothquant",
    title="large columns of inputs made smaller, those of the weight larger",
    parameters=SmoothQuantParameters,
    statistics=_statistics,
    prepare_block=_prepare,
    scales_inputs=lambda parameters: not parameters.fold,
    why_idle=why_no_rounded_activations,
)
