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
from torch import Tensor, nn

from qkernels.calibration.forwards import run_batch
from qkernels.calibration.walks import replace_forward
from qkernels.modules import WQLinear
from qkernels.quantizers.gradients import divergence, frozen, gives_logits, output_of, pieces
from qkernels.quantizers.method import Method, ModelTask
from qkernels.rounding import nonzero
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, code_values


@dataclass(frozen=True)
class DistillParameters:
    """Attributes:
    steps: of Adam.
    sequences: of calibration, in each step.
    lr: how far a step moves a scale, as a part of it; falls to 0 by half a cosine.
    rounding: how far a step moves the point at which a weight is rounded to another code, in codes;
        falls like `lr`. 0 leaves codes as they are.
    seed: of the order of sequences.
    """

    steps: int = 128
    sequences: int = 4
    lr: float = 1e-3
    rounding: float = 0.0
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
        offsets: fp32 [N, G, L], added to its codes before they are rounded, or None where codes
            stay as they are. They begin as what is missing to the dense weight.
    """

    def __init__(self, weight: QuantizedWeight, dense: Tensor | None) -> None:
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
        self.offsets: Tensor | None = None
        if dense is not None:
            rows = dense.float() if weight.perm is None else dense.float()[:, weight.perm]
            rows = F.pad(rows, (0, groups * length - weight.k)).unflatten(1, (groups, length))
            real = rows / nonzero(self._scales)[:, :, None]
            zero = 0 if zeros is None else zeros
            zero = torch.as_tensor(zero, dtype=torch.float32).expand_as(self._scales)[:, :, None]
            self.offsets = (real - self._values).clamp_(-0.49, 0.49).requires_grad_()
            low = -float(scheme.implied_zero)
            self._low = low - zero
            self._high = low + (1 << scheme.bits) - 1 - zero

    def values(self) -> Tensor:
        """What the codes stand for, in units of their scale: [N, G, L]."""
        if self.offsets is None:
            return self._values
        with torch.no_grad():
            moved = (self._values + self.offsets).round_()
            return torch.minimum(torch.maximum(moved, self._low), self._high)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self._weight
        if weight.input_factor is not None:
            x = x * weight.input_factor.to(x.dtype)
        codes_x = x if weight.perm is None else x[..., weight.perm]
        y: Tensor = _Product.apply(
            codes_x, self._scales * self.factors, self.values(), weight.k, self.offsets
        )
        if weight.outlier_columns is not None and weight.outlier_values is not None:
            outliers = weight.outlier_values.to(x.dtype)
            y = y + F.linear(codes_x[..., weight.outlier_columns], outliers)
        return y if weight.bias is None else y + weight.bias.to(y.dtype)

    @torch.no_grad()
    def move_offsets(self, distance: float) -> None:
        """Moves each offset against its gradient, all by the same distance."""
        if self.offsets is not None and self.offsets.grad is not None:
            self.offsets.add_(self.offsets.grad.sign_(), alpha=-distance)
            self.offsets.grad = None

    def result(self) -> QuantizedWeight:
        """The weight under the scales that were found; those that lost their sign stay."""
        before = self._weight.scales
        found = (self._scales * self.factors.detach()).to(before.dtype)
        good = found.isfinite() & (found.sign() == before.sign())
        codes = self._weight.codes
        if self.offsets is not None:
            shift = (self.values() - self._low).flatten(1)[:, : self._weight.k]
            codes = shift.round().to(torch.uint8)
        return self._weight.replace(scales=torch.where(good, found, before), codes=codes)


def _real_zeros(weight: QuantizedWeight) -> bool:
    return weight.zeros is not None and weight.zeros.is_floating_point()


class _Product(torch.autograd.Function):
    """x W^T with W dequantized when it is needed, in either direction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, values: Tensor, k: int, offsets: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, scales, values)
        return F.linear(x, _dequantized(scales, values, k, x.dtype))

    @staticmethod
    def backward(
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor, None, None, Tensor | None]:
        x, scales, values = ctx.saved_tensors
        gradient, k = gradients[0], x.shape[-1]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ _dequantized(scales, values, k, x.dtype)
        to_weight = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, k)
        groups, length = values.shape[1:]
        to_weight = F.pad(to_weight, (0, groups * length - k)).unflatten(1, (groups, length))
        to_scales = (to_weight * values).sum(dim=2, dtype=torch.float32)
        to_offsets = to_weight.float() if ctx.needs_input_grad[4] else None
        return to_x, to_scales, None, None, to_offsets


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
        trained = {}
        for name, layer in layers.values():
            original = task.changes.original(name)
            assert isinstance(original, nn.Linear)
            dense = original.weight.detach() if parameters.rounding else None
            trained[name] = _Trained(layer.to_weight(), dense)
        own = [t.factors for t in trained.values()]
        optimizer = torch.optim.Adam(own, lr=parameters.lr, betas=(0.9, 0.99))
        for number, batches in enumerate(steps):
            progress = (number + 0.5) / parameters.steps
            falling = (1 + math.cos(math.pi * progress)) / 2
            for group in optimizer.param_groups:
                group["lr"] = parameters.lr * falling
            for batch in batches:
                with torch.no_grad(), task.dense():
                    wanted = run_batch(task.model, batch)
                with contextlib.ExitStack() as stack:
                    for name, layer in layers.values():
                        stack.callback(replace_forward(layer, trained[name].forward))
                    found = run_batch(task.model, batch)
                    (_loss(found, wanted) / len(batches)).backward()
            for each in trained.values():
                each.move_offsets(parameters.rounding * falling)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: layer.result() for name, layer in trained.items()}


def _loss(found: Any, wanted: Any) -> Tensor:
    result, target = output_of(found), output_of(wanted)
    if gives_logits(found):
        return divergence(result, target)
    target = target.float()
    return (result.float() - target).square().sum() / target.square().sum()


def _steps(task: ModelTask, parameters: DistillParameters) -> Iterator[list[Any]]:
    """What each step runs, one after the other: all of calibration in a drawn order, and again."""
    cut = [piece for batch in task.batches for piece in pieces(batch, 1)]
    generator = torch.Generator().manual_seed(parameters.seed)
    order: list[int] = []
    for _ in range(parameters.steps):
        step: list[Any] = []
        while len(step) < parameters.sequences:
            if not order:
                order = torch.randperm(len(cut), generator=generator).tolist()
            step.append(cut[order.pop()])
        yield step


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
