"""Distillation of scales: with codes as they are, scales learn to give the dense model's outputs.

    min over s of  KL(p_dense || p_quantized)

by Adam over calibration batches, end to end. Models without logits learn by the relative squared
error of their outputs. Scales are trained as factors of what they were. Some sequences are kept
aside: they say how much of the way scales go, and where the model is no nearer to the dense one on
them, it stays as it was.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import sparse
from qkernels.calibration.calls import replace_forward
from qkernels.calibration.forwards import run_batch
from qkernels.errors import LayerError
from qkernels.modules import WQLinear
from qkernels.quantizers.gradients import (
    Recomputed,
    counted,
    counted_rows,
    divergence,
    frozen,
    gives_logits,
    output_of,
    pieces,
)
from qkernels.quantizers.method import Method, ModelTask, check_seed
from qkernels.weight import QuantizedWeight, code_values


@dataclass(frozen=True)
class DistillParameters:
    """Attributes:
    steps: of Adam.
    sequences: of calibration, in each step.
    lr: how far a step moves a scale of 4 bits, as a part of it: at each bit less twice as far, so
        that codes at the ends of the range move by as many codes. Falls to 0 by half a cosine.
    seed: of the order of sequences.
    """

    steps: int = 64
    sequences: int = 4
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.sequences < 1:
            raise ValueError(
                f"steps and sequences must be 1 or more, got {self.steps} and {self.sequences}"
            )
        if not 0 < self.lr < 1:
            raise ValueError(f"lr must be in (0, 1), got {self.lr:g}")
        check_seed(self.seed)


_FEW, _MOST_ASIDE = 16, 8
"""From so many sequences on some are kept aside, and how many at most."""

_EPSILON = 1e-16
"""Adam's: gradients of the factors of 8 bits are about 1e-9."""

_HALF_SCALE = 2.0**12
"""What the loss is multiplied by in fp16, whose least number is 6e-8; Adam does not see it."""

_MOST_HALVINGS = 3
"""Of the way that scales have gone: what is left of noise falls with its square."""


class _Trained:
    """A quantized layer whose scales are trained.

    Attributes:
        factors: fp32 [N, G], of its scales; [1, 1] where the whole weight has one.
        reach: how far they move, as a multiple of those of 4 bits.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        scheme = weight.scheme
        self._dtype = dtype
        # What gradients need may not come from inference mode.
        self._hub = weight.replace(
            **{name: value.clone() for name, value in weight.fields.items() if value.is_inference()}
        )
        values = code_values(scheme, weight.codes)
        length, groups = scheme.group_length(weight.k), scheme.groups(weight.k)
        values = F.pad(values, (0, groups * length - weight.k)).unflatten(1, (groups, length))
        zeros = weight.group_zeros()
        if zeros is not None:
            values -= zeros[:, :, None]
        real = weight.zeros is not None and weight.zeros.is_floating_point()
        # In one byte where that holds them: they are whole numbers below 128.
        small = scheme.weight.kind == "linear" and scheme.bits < 8 and not real
        self._values = values.to(torch.int8 if small else dtype)
        # One of a whole weight is one number, which its rows share.
        self._scales = weight.scales.float()
        self.factors = torch.ones_like(self._scales, requires_grad=True)
        # The neighbours of a float8 are as far from it, for its size, as in 4 bits.
        bits = 4 if scheme.weight.kind == "float8" else max(2, scheme.bits)
        self.reach = 2.0 ** (4 - bits)
        self._weight = torch.empty(0)

    @torch.no_grad()
    def begin(self) -> None:
        """Makes the weight of the present factors, which `forward` multiplies with."""
        # Scales rounded to bf16 would move by half a percent or not at all.
        scales = (self._scales * self.factors)[:, :, None]
        weight = (self._values * scales).to(self._dtype).flatten(1)
        self._weight = weight[:, : self._hub.k].contiguous()

    def end(self) -> None:
        """Lets go of what `begin` made."""
        self._weight = torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        x, hub = input, self._hub
        if hub.input_factor is not None:
            x = x * hub.input_factor.to(x.dtype)
        if hub.perm is not None:
            x = x[..., hub.perm]
        y: Tensor = _Product.apply(x, self.factors, self)
        if hub.outlier_columns is not None and hub.outlier_values is not None:
            y = y + F.linear(x[..., hub.outlier_columns], hub.outlier_values.to(x.dtype))
        if hub.sparse_ends is not None:
            added = sparse.product(x.flatten(0, -2), hub.fields)
            y = y + added.view(y.shape).to(y.dtype)
        return y if hub.bias is None else y + hub.bias.to(y.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[N, K]."""
        return self._weight.to(dtype)

    def gradient(self, of_weight: Tensor) -> Tensor:
        """That of the factors, from that of the weight, [N, K]."""
        groups, length = self._values.shape[1:]
        padded = F.pad(of_weight, (0, groups * length - self._hub.k)).unflatten(1, (groups, length))
        by_scale: Tensor = (padded * self._values).sum(dim=2, dtype=torch.float32)
        return by_scale.sum_to_size(self._scales.shape) * self._scales

    def result(self) -> QuantizedWeight:
        """The weight under the scales that were found; those that lost their sign stay."""
        before = self._hub.scales
        found = (self._scales * self.factors.detach()).to(before.dtype)
        good = found.isfinite() & (found.sign() == before.sign())
        return self._hub.replace(scales=torch.where(good, found, before))


class _Product(torch.autograd.Function):
    """x W^T, whose gradient of W is summed up to that of the factors at once, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, layer: _Trained) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (x,), layer, gradient = ctx.saved_tensors, ctx.layer, gradients[0]
        of_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        of_x = gradient @ layer.weight(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, layer.gradient(of_weight), None


def _distill(task: ModelTask, parameters: DistillParameters) -> Mapping[str, QuantizedWeight]:
    layers: dict[int, tuple[str, WQLinear]] = {}
    for name, quantized in task.layers.items():
        if isinstance(quantized, WQLinear) and quantized.scheme.scale_levels == "one":
            layers.setdefault(id(quantized), (name, quantized))
    if not layers:
        warnings.warn("distill trains no scales that are quantized themselves", stacklevel=2)
        return {}
    aside, cut = _set_aside([piece for batch in task.batches for piece in pieces(batch, 1)])
    with frozen(task.model):
        run = _Distillation(task, layers)
        before = run.divergence(aside)
        if not math.isfinite(before):
            raise LayerError("distill: the model's outputs on calibration sequences are not finite")
        run.train(_steps(cut, parameters), parameters)
        # So that whoever was near a minimum, or is past it, loses nothing.
        return run.results() if run.shorten(aside, before) else {}


class _Distillation:
    """Layers in training, by the names of their modules. Args: layers: id -> name and module."""

    def __init__(self, task: ModelTask, layers: Mapping[int, tuple[str, WQLinear]]) -> None:
        self._task, self._layers = task, dict(layers.values())
        self._half = any(layer.dtype == torch.float16 for layer in self._layers.values())
        self._trained = {
            name: _Trained(layer.to_weight(), layer.dtype) for name, layer in self._layers.items()
        }

    def results(self) -> dict[str, QuantizedWeight]:
        return {name: each.result() for name, each in self._trained.items()}

    def divergence(self, batches: Sequence[Any]) -> float:
        """From the dense model: the mean over `batches`."""
        with self._weights():
            return sum(self._loss(batch) for batch in batches) / len(batches)

    def train(self, steps: Iterator[list[Any]], parameters: DistillParameters) -> None:
        optimizer = torch.optim.Adam(
            [
                {"params": [each.factors], "lr": parameters.lr * each.reach}
                for each in self._trained.values()
            ],
            betas=(0.9, 0.99),
            eps=_EPSILON,
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        for number, batches in enumerate(steps):
            progress = (number + 0.5) / parameters.steps
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
            with self._weights():
                for batch in batches:
                    self._learn(batch, 1 / len(batches))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def shorten(self, batches: Sequence[Any], before: float) -> bool:
        """Halves the way from the first scales to the present ones while that brings the model
        nearer to the dense one; whether it is then nearer than it was, at `before`."""
        reached = self.divergence(batches)
        for _ in range(_MOST_HALVINGS):
            learned = {name: each.factors.detach().clone() for name, each in self._trained.items()}
            for each in self._trained.values():
                each.factors.data.add_(1).div_(2)
            shorter = self.divergence(batches)
            if shorter >= reached:
                for name, factors in learned.items():
                    self._trained[name].factors.data.copy_(factors)
                break
            reached = shorter
        return reached < before

    @contextlib.contextmanager
    def _weights(self) -> Iterator[None]:
        """A context in which the layers have the weights of the present factors."""
        with contextlib.ExitStack() as stack:
            for each in self._trained.values():
                each.begin()
                stack.callback(each.end)
            yield

    def _learn(self, batch: Any, share: float) -> None:
        """Adds `share` of the gradients of a batch to the factors'."""
        wanted = self._dense(batch)
        # Blocks run again in the backward pass, as they did before.
        with self._in_training(), Recomputed(self._task.model, self._layers):
            loss = _loss(run_batch(self._task.model, batch), wanted, batch)
            (loss * share * (_HALF_SCALE if self._half else 1.0)).backward()

    def _loss(self, batch: Any) -> float:
        wanted = self._dense(batch)
        with torch.no_grad(), self._in_training():
            return float(_loss(run_batch(self._task.model, batch), wanted, batch))

    def _dense(self, batch: Any) -> Any:
        with torch.no_grad(), self._task.dense():
            return run_batch(self._task.model, batch)

    @contextlib.contextmanager
    def _in_training(self) -> Iterator[None]:
        """A context in which the model runs the layers in training."""
        with contextlib.ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(replace_forward(layer, self._trained[name].forward))
            yield


def _loss(found: Any, wanted: Any, batch: Any) -> Tensor:
    result, target = output_of(found), output_of(wanted)
    kept = counted(batch, result)
    if gives_logits(found):
        return divergence(result, target, kept)
    result, target = (counted_rows(x.float(), kept) for x in (result, target))
    return (result - target).square().sum() / target.square().sum()


def _set_aside(cut: list[Any]) -> tuple[list[Any], list[Any]]:
    """One of 16 sequences, spread over all, and the rest; all of them twice where they are few."""
    if len(cut) < _FEW:
        return cut, cut
    aside = range(0, len(cut), max(_FEW, len(cut) // _MOST_ASIDE))[:_MOST_ASIDE]
    return [cut[i] for i in aside], [piece for i, piece in enumerate(cut) if i not in aside]


def _steps(cut: Sequence[Any], parameters: DistillParameters) -> Iterator[list[Any]]:
    """What each step runs, one after the other: all of `cut` in a drawn order, and again."""
    generator = torch.Generator().manual_seed(parameters.seed)
    order: list[int] = []
    for _ in range(parameters.steps):
        step: list[Any] = []
        while len(step) < parameters.sequences:
            if not order:
                order = torch.randperm(len(cut), generator=generator).tolist()
            step.append(cut[order.pop()])
        yield step


DISTILL = Method(
    name="distill",
    title="scales trained to give the dense model's outputs",
    parameters=DistillParameters,
    finish=_distill,
    uses_batches=True,
)
