"""Distillation of scales: with codes as they are, scales learn to give the dense model's outputs.

    min over s of  KL(p_dense || p_quantized)

by Adam over calibration batches, end to end. Models without logits learn by the relative squared
error of their outputs. Scales are trained as factors of what they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.calibration.forwards import run_batch
from qkernels.calibration.walks import replace_forward
from qkernels.modules import WQLinear
from qkernels.quantizers.gradients import divergence, frozen, gives_logits, output_of, pieces
from qkernels.quantizers.method import Method, ModelTask
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, code_values


@dataclass(frozen=True)
class DistillParameters:
    """Attributes:
    steps: of Adam.
    sequences: of calibration, in each step.
    lr: how far a step moves a scale, as a part of it; falls to 0 by half a cosine.
    seed: of the order of sequences.
    """

    steps: int = 128
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


class _Trained:
    """A quantized layer whose scales are trained.

    Attributes:
        factors: fp32 [N, G], of its scales.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        scheme = weight.scheme
        self._weight = weight
        values = code_values(scheme, weight.codes)
        length, groups = scheme.group_length(weight.k), scheme.groups(weight.k)
        values = F.pad(values, (0, groups * length - weight.k)).unflatten(1, (groups, length))
        zeros = weight.group_zeros()
        if zeros is not None:
            values -= zeros[:, :, None]
        exact = scheme.weight.kind == "linear" and scheme.bits < 8 and not _real_zeros(weight)
        # In one byte where that holds them: they are whole numbers below 128.
        self._values = values.to(torch.int8) if exact else values
        self._scales = weight.group_scales()
        self.factors = torch.ones_like(self._scales, requires_grad=True)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self._weight
        if weight.input_factor is not None:
            x = x * weight.input_factor.to(x.dtype)
        codes_x = x if weight.perm is None else x[..., weight.perm]
        y: Tensor = _Product.apply(codes_x, self._scales * self.factors, self._values, weight.k)
        if weight.outlier_columns is not None and weight.outlier_values is not None:
            outliers = weight.outlier_values.to(x.dtype)
            y = y + F.linear(codes_x[..., weight.outlier_columns], outliers)
        return y if weight.bias is None else y + weight.bias.to(y.dtype)

    def result(self) -> QuantizedWeight:
        """The weight under the scales that were found; those that lost their sign stay."""
        before = self._weight.scales
        found = (self._scales * self.factors.detach()).to(before.dtype)
        good = found.isfinite() & (found.sign() == before.sign())
        return self._weight.replace(scales=torch.where(good, found, before))


def _real_zeros(weight: QuantizedWeight) -> bool:
    return weight.zeros is not None and weight.zeros.is_floating_point()


class _Product(torch.autograd.Function):
    """x W^T with W dequantized when it is needed, in either direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor, values: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(x, scales, values)
        return F.linear(x, _dequantized(scales, values, k, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, scales, values = ctx.saved_tensors
        gradient, k = gradients[0], x.shape[-1]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ _dequantized(scales, values, k, x.dtype)
        to_weight = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, k)
        groups, length = values.shape[1:]
        to_weight = F.pad(to_weight, (0, groups * length - k)).unflatten(1, (groups, length))
        return to_x, (to_weight * values).sum(dim=2, dtype=torch.float32), None, None


def _dequantized(scales: Tensor, values: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in `dtype`."""
    return (values.to(dtype) * scales.to(dtype)[:, :, None]).flatten(1)[:, :k]


def _distill(task: ModelTask, parameters: DistillParameters) -> Mapping[str, QuantizedWeight]:
    layers: dict[int, tuple[str, WQLinear]] = {}
    for name, layer in task.layers.items():
        if isinstance(layer, WQLinear) and _why_not(layer.scheme, parameters) is None:
            layers.setdefault(id(layer), (name, layer))
    steps = _steps(task, parameters)
    with frozen(task.model):
        trained = {name: _Trained(layer.to_weight()) for name, layer in layers.values()}
        own = [t.factors for t in trained.values()]
        optimizer = torch.optim.Adam(own, lr=parameters.lr, betas=(0.9, 0.99))
        for number, batch in enumerate(steps):
            progress = (number + 0.5) / parameters.steps
            for group in optimizer.param_groups:
                group["lr"] = parameters.lr * (1 + math.cos(math.pi * progress)) / 2
            with torch.no_grad(), task.dense():
                wanted = run_batch(task.model, batch)
            with contextlib.ExitStack() as stack:
                for name, layer in layers.values():
                    stack.callback(replace_forward(layer, trained[name].forward))
                found = run_batch(task.model, batch)
                _loss(found, wanted).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: layer.result() for name, layer in trained.items()}


def _loss(found: Any, wanted: Any) -> Tensor:
    result, target = output_of(found), output_of(wanted)
    if gives_logits(found):
        return divergence(result, target)
    target = target.float()
    return (result.float() - target).square().sum() / target.square().sum()


def _steps(task: ModelTask, parameters: DistillParameters) -> Iterator[Any]:
    """A batch for each step: all of calibration in a drawn order, then in another."""
    cut = [piece for batch in task.batches for piece in pieces(batch, parameters.sequences)]
    generator = torch.Generator().manual_seed(parameters.seed)
    order: list[int] = []
    for _ in range(parameters.steps):
        if not order:
            order = torch.randperm(len(cut), generator=generator).tolist()
        yield cut[order.pop()]


def _why_not(scheme: QuantScheme, parameters: DistillParameters) -> str | None:
    if scheme.scale_levels != "one":
        return "its scales are quantized themselves"
    return None


DISTILL = Method(
    name="distill",
    title="scales trained to give the dense model's outputs",
    parameters=DistillParameters,
    finish=_distill,
    uses_batches=True,
    why_not=_why_not,
)
