"""AWQ: columns that matter are made larger before they are rounded, and their inputs smaller.

    Q(W diag(s)) diag(1/s) x,    s = a^t / w^(1-t)

with a the size of each input, w the mean size of a column's weights within their groups, and t in
[0, 1] searched for the least error of the output (Lin et al. 2023, AWQ, section 3.2; dividing by w
as in AutoAWQ). 1/s goes into whatever is in front: a norm, or the rows of a linear layer. Which
that is is found by running the block (`calibration/neighbours.py`).

The error of the output is tr(E H E^T) with E that of the weight and H = x^T x, so no x is kept.
Then the range of each group is searched the same way, with its block of H, in place of AWQ's
clipping by ratios of the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qkernels import rounding
from qkernels.backends.cpu_calibration import transposed_product
from qkernels.calibration.neighbours import Neighbours
from qkernels.calibration.statistics import Needs
from qkernels.quantizers import grids
from qkernels.quantizers.hessian import gram_of
from qkernels.quantizers.method import BlockTask, LayerTask, Method
from qkernels.quantizers.producers import any_scale, around_one, consumers_of, neighbours_of
from qkernels.scheme import QuantScheme
from qkernels.weight import WeightParameters, row_slices

_LEAST_FACTOR = 1e-4

_KEPT = ("outlier_columns", "outlier_values")
"""The fields of columns in 16 bits."""


@dataclass(frozen=True)
class AwqParameters:
    """Attributes:
    steps: how many t in [0, 1] are tried, with and without the weights' part; 0 scales nothing.
    grid: what the range of each group is fitted to; see `grids.Grid`.
    keep: the part of each layer's columns, those with the largest inputs, that stays in 16 bits
        beside the codes.
    """

    steps: int = 20
    grid: grids.Grid = "block"
    keep: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, got {self.steps}")
        if not 0 <= self.keep < 1:
            raise ValueError(f"keep must be in [0, 1), got {self.keep:g}")


def _statistics(scheme: QuantScheme, parameters: AwqParameters) -> Needs:
    return Needs(quantized=("gram",))


def _prepare(task: BlockTask, parameters: AwqParameters) -> None:
    if not parameters.steps:
        return
    for found in neighbours_of(task):
        consumers = _Consumers.of(task, found)
        if consumers is None:
            continue
        factor = consumers.best_factor(parameters.steps)
        if factor is not None:
            for name, values in found.rewritten(task.module, factor):
                task.rewrite(name, values)


@dataclass(frozen=True)
class _Consumer:
    """A layer behind a producer. Attributes: weight: fp32 [N, K]; gram: [K, K]."""

    weight: Tensor
    scheme: QuantScheme
    gram: Tensor

    def loss(self, factor: Tensor) -> float:
        """|x E^T|^2 / |x W^T|^2 where the weight is rounded with its columns times `factor`."""
        scaled = self.weight * factor
        fitted = rounding.fit(scaled, self.scheme, activation_scale=any_scale(self.scheme))
        lost = 0.0
        for start, stop in row_slices(*scaled.shape):
            codes = rounding.encode_rows(scaled[start:stop], fitted, start)
            error = fitted.dequantize_rows(codes, start).div_(factor)
            lost += _squared_output(error.sub_(self.weight[start:stop]), self.gram)
        return lost / self.kept if self.kept else 0.0

    @cached_property
    def kept(self) -> float:
        """|x W^T|^2."""
        return sum(
            _squared_output(self.weight[start:stop], self.gram)
            for start, stop in row_slices(*self.weight.shape)
        )


def _squared_output(rows: Tensor, gram: Tensor) -> float:
    """|x R^T|^2 of rows R [N, K]: the sum over R^T R times `gram`, of which half is computed."""
    return float((transposed_product(rows, rows) * gram).sum())


@dataclass(frozen=True)
class _Consumers:
    """The quantized layers behind a producer, and which of its outputs their columns are."""

    layers: list[_Consumer]
    channels: Tensor
    count: int

    @staticmethod
    def of(task: BlockTask, found: Neighbours) -> _Consumers | None:
        """None where calibration reached none."""
        layers = [
            _Consumer(
                task.layers[name].weight.detach().float(),
                task.schemes[name],
                gram_of(task.inputs[name]),
            )
            for name in consumers_of(task, found)
        ]
        if not layers:
            return None
        return _Consumers(layers, found.channels.to(layers[0].weight.device), found.count)

    def best_factor(self, steps: int) -> Tensor | None:
        """fp32 [count], or None where nothing is better than no factor."""
        least = sum(layer.loss(torch.ones_like(layer.gram[0])) for layer in self.layers)
        best = None
        for factor in self._factors(steps):
            found = sum(layer.loss(factor[self.channels]) for layer in self.layers)
            if found < least:
                least, best = found, factor
        return best

    def _factors(self, steps: int) -> Iterator[Tensor]:
        """fp32 [count] each, around 1."""
        inputs = sum(layer.gram.diagonal() for layer in self.layers)
        assert isinstance(inputs, Tensor)
        sizes = self._of_outputs(inputs.sqrt())
        weights = [_sizes_in_groups(layer.weight, layer.scheme) for layer in self.layers]
        rows = [len(layer.weight) for layer in self.layers]
        mean = sum(w * n for w, n in zip(weights, rows, strict=True)) / sum(rows)
        assert isinstance(mean, Tensor)
        divisors = self._of_outputs(mean)
        for step in range(1, steps + 1):
            t = step / steps
            yield _bounded(sizes**t)
            yield _bounded(sizes**t / divisors ** (1 - t))

    def _of_outputs(self, columns: Tensor) -> Tensor:
        """The geometric mean of the columns that are one output of the producer."""
        sums = columns.new_zeros(self.count)
        counts = columns.new_zeros(self.count)
        sums.index_add_(0, self.channels, columns.clamp(min=_LEAST_FACTOR).log())
        counts.index_add_(0, self.channels, torch.ones_like(columns))
        return (sums / counts.clamp(min=1)).exp()


def _sizes_in_groups(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """The mean over rows of |w| / the largest |w| of its group: fp32 [K]."""
    sizes = weight.abs()
    for columns in sizes.split(scheme.group_length(weight.shape[1]), dim=1):
        columns /= columns.amax(dim=1, keepdim=True).clamp(min=1e-12)
    return sizes.mean(dim=0)


def _bounded(factor: Tensor) -> Tensor:
    return around_one(factor.clamp(min=_LEAST_FACTOR))


def _quantize(task: LayerTask, parameters: AwqParameters) -> WeightParameters:
    assert task.inputs is not None
    weight, gram = task.weight.float(), gram_of(task.inputs)
    beside: dict[str, Tensor] = {}
    count = round(parameters.keep * weight.shape[1])
    if count:
        # The least number of a 16-bit type that holds the weight itself.
        dtype = torch.float16 if task.weight.dtype == torch.float32 else task.weight.dtype
        columns = gram.diagonal().topk(count).indices.sort().values
        beside = dict(zip(_KEPT, (columns, weight[:, columns].to(dtype)), strict=True))
        weight = weight.clone()
        weight[:, columns] = 0
    fitted = rounding.fit(weight, task.scheme, activation_scale=task.activation_scale)
    return grids.search(weight, fitted, parameters.grid, gram).replace(**beside)


def _why_not(scheme: QuantScheme, parameters: AwqParameters) -> str | None:
    if parameters.keep and not scheme.weight_only:
        return "columns in 16 bits go with activations in 16 bits"
    if parameters.keep and scheme.weight.values is not None and 0 not in scheme.weight.values:
        return f"{scheme.weight.name} has no zero, which columns in 16 bits have as their codes"
    return None


AWQ = Method(
    name="awq",
    title="columns scaled by their inputs, ranges by the output's error",
    parameters=AwqParameters,
    statistics=_statistics,
    prepare_block=_prepare,
    quantize=_quantize,
    adds=lambda parameters: frozenset(_KEPT if parameters.keep else ()),
    why_not=_why_not,
)
