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

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        scheme = weight.scheme
        self._hub, self._dtype = weight, dtype
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
        self._scales = weight.group_scales()
        self.factors = torch.ones_like(self._scales, requires_grad=True)
        self._weight = torch.empty(0)

    @torch.no_grad()
    def begin(self) -> None:
        """Makes the weight that a step multiplies with."""
        scales = (self._scales * self.factors).to(self._dtype)
        weight = (self._values.to(self._dtype) * scales[:, :, None]).flatten(1)
        self._weight = weight[:, : self._hub.k].contiguous().requires_grad_()

    def forward(self, input: Tensor) -> Tensor:
        x, hub = input, self._hub
        if hub.input_factor is not None:
            x = x * hub.input_factor.to(x.dtype)
        if hub.perm is not None:
            x = x[..., hub.perm]
        y = F.linear(x, self._weight.to(x.dtype))
        if hub.outlier_columns is not None and hub.outlier_values is not None:
            y = y + F.linear(x[..., hub.outlier_columns], hub.outlier_values.to(x.dtype))
        return y if hub.bias is None else y + hub.bias.to(y.dtype)

    @torch.no_grad()
    def end(self) -> None:
        """Makes the gradient of the factors from that of the weight."""
        gradient, self._weight = self._weight.grad, torch.empty(0)
        if gradient is None:
            return
        groups, length = self._values.shape[1:]
        gradient = F.pad(gradient, (0, groups * length - self._hub.k)).unflatten(
            1, (groups, length)
        )
        by_scale = (gradient * self._values).sum(dim=2, dtype=torch.float32)
        self.factors.grad = by_scale.mul_(self._scales)

    def result(self) -> QuantizedWeight:
        """The weight under the scales that were found; those that lost their sign stay."""
        before = self._hub.scales
        found = (self._scales * self.factors.detach()).to(before.dtype)
        good = found.isfinite() & (found.sign() == before.sign())
        return self._hub.replace(scales=torch.where(good, found, before))


def _distill(task: ModelTask, parameters: DistillParameters) -> Mapping[str, QuantizedWeight]:
    layers: dict[int, tuple[str, WQLinear]] = {}
    for name, quantized in task.layers.items():
        if isinstance(quantized, WQLinear) and _why_not(quantized.scheme, parameters) is None:
            layers.setdefault(id(quantized), (name, quantized))
    steps = _steps(task, parameters)
    with frozen(task.model):
        trained = {
            name: _Trained(layer.to_weight(), layer.dtype) for name, layer in layers.values()
        }
        own = [t.factors for t in trained.values()]
        optimizer = torch.optim.Adam(own, lr=parameters.lr, betas=(0.9, 0.99))
        for number, batches in enumerate(steps):
            progress = (number + 0.5) / parameters.steps
            for group in optimizer.param_groups:
                group["lr"] = parameters.lr * (1 + math.cos(math.pi * progress)) / 2
            for layer in trained.values():
                layer.begin()
            for batch in batches:
                with torch.no_grad(), task.dense():
                    wanted = run_batch(task.model, batch)
                with contextlib.ExitStack() as stack:
                    for name, quantized in layers.values():
                        stack.callback(replace_forward(quantized, trained[name].forward))
                    found = run_batch(task.model, batch)
                    (_loss(found, wanted) / len(batches)).backward()
            for layer in trained.values():
                layer.end()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: each.result() for name, each in trained.items()}


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
