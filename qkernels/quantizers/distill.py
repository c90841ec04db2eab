"""Distillation of scales: with codes as they are, scales learn to give the dense model's outputs.

    min over s of  KL(p_dense || p_quantized)

by Adam over calibration batches, end to end. Scales are trained as factors of what they were. Some
sequences are kept aside: they say how much of the way scales go, and where the model is no nearer
to the dense one on them, it stays as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import sparse
from qkernels.quantizers.end_to_end import EndToEnd, quantized_layers
from qkernels.quantizers.gradients import frozen
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


_EPSILON = 1e-16
"""Adam's: gradients of the factors of 8 bits are about 1e-9."""

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

    def learn(self) -> None:
        """The factors have their gradients."""

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
    layers = {
        name: layer
        for name, layer in quantized_layers(task).items()
        if layer.scheme.scale_levels == "one"
    }
    if not layers:
        warnings.warn("distill trains no scales that are quantized themselves", stacklevel=2)
        return {}
    with frozen(task.model):
        trained = {name: _Trained(own.to_weight(), own.dtype) for name, own in layers.items()}
        run = EndToEnd(task, layers, trained)
        before = run.first_divergence(DISTILL.name)
        optimizer = torch.optim.Adam(
            [
                {"params": [each.factors], "lr": parameters.lr * each.reach}
                for each in trained.values()
            ],
            betas=(0.9, 0.99),
            eps=_EPSILON,
        )
        run.train(optimizer, parameters.steps, parameters.sequences, parameters.seed)
        # So that whoever was near a minimum, or is past it, loses nothing.
        if not _shorten(run, trained, before):
            return {}
        return {name: each.result() for name, each in trained.items()}


def _shorten(run: EndToEnd, trained: Mapping[str, _Trained], before: float) -> bool:
    """Halves the way from the first scales to the present ones while that brings the model nearer
    to the dense one; whether it is then nearer than it was, at `before`."""
    reached = run.divergence()
    for _ in range(_MOST_HALVINGS):
        learned = {name: each.factors.detach().clone() for name, each in trained.items()}
        for each in trained.values():
            each.factors.data.add_(1).div_(2)
        shorter = run.divergence()
        if shorter >= reached:
            for name, factors in learned.items():
                trained[name].factors.data.copy_(factors)
            break
        reached = shorter
    return reached < before


DISTILL = Method(
    name="distill",
    title="scales trained to give the dense model's outputs",
    parameters=DistillParameters,
    finish=_distill,
    uses_batches=True,
)
