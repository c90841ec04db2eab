"""A linear layer in training that computes what its quantized form will.

    W' = s (Q(W / s + z) - z),    y = Q_x(x) W'^T + b

Gradients pass rounding as if it were not there, and stop where a weight is clipped (the
straight-through estimator, Bengio et al. 2013). Scales and zero points are those of the weight's
range at each step, or learned with it (LSQ, Esser et al. 2020, and LSQ+, Bhalgat et al. 2020, for
zero points):

    dW'/ds = Q(v) - z - (v - z  inside of the range, else 0),    v = W / s + z
    dW'/dz = 0  inside of the range, else -s

times 1 / sqrt(numbers of a scale * the largest code), which keeps the steps of scales and weights
alike.

A weight that was quantized before has the numbers of its codes, where LSQ's gradient of the scale
is 0. There a scale takes the weights along with it: v = W / s_0 + z, s_0 the scale that it began
with, so that codes change as weights do, and not as scales do:

    dW'/ds = Q(v) - z,    dW'/dW = s / s_0  inside of the range, else 0
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels import positions, rounding
from qkernels.errors import SchemeError, WeightError
from qkernels.modules.linear import WQLinear
from qkernels.reference import (
    outlier_columns,
    quantize_rows,
    quantize_rows_asymmetric,
    quantize_with_zero,
    tensor_scale,
    without_columns,
)
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters, apply_by_group


class FakeQuantLinear(nn.Linear):
    """`nn.Linear` whose weight is rounded to a scheme in each forward, and its inputs as well.

    Attributes:
        scheme: what it is rounded to.
        scales: fp32 [N, G] ([1, 1] where the whole weight has one), where they are learned; else
            None, and they are those of the weight's range.
        zeros: fp32 of the same shape, where zero points are learned too; else None.
        start_scales: fp32, as `scales`: those that a quantized layer began with, under which
            weights are rounded to codes; else None.
        activation_scale: fp32 [], of static activations, learned from the first batch on; 0 before
            it. None where the scheme has none.

    Args:
        layer: its parameters become this layer's.
        learn: learn scales and zero points.

    Raises:
        SchemeError: for static activations with a zero point or a scale per position, and for
            scales to be learned that are quantized themselves.
    """

    scales: nn.Parameter | None
    zeros: nn.Parameter | None
    start_scales: Tensor | None
    activation_scale: nn.Parameter | None

    def __init__(self, layer: nn.Linear, scheme: QuantScheme | str, *, learn: bool = True) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.scheme = QuantScheme.parse(scheme)
        if self.scheme.activation.by_position:
            raise SchemeError(
                f"{self.scheme}: scales of activations per position are not learned: use -static"
            )
        if self.scheme.activation.granularity == "staticasym":
            raise SchemeError(f"{self.scheme}: zero points of static activations are not learned")
        if learn and self.scheme.scale_levels != "one":
            raise SchemeError(
                f"{self.scheme}: scales that are quantized themselves are not learned: use "
                'step="range"'
            )
        self.weight, self.bias = layer.weight, layer.bias
        self._dtype: torch.dtype | None = None
        self.train(layer.training)
        scales = zeros = static = None
        if learn:
            fitted = rounding.fit(layer.weight.detach(), self.scheme.dynamic)
            scales = nn.Parameter(fitted.scales.float())
            zeros = None if fitted.zeros is None else nn.Parameter(fitted.zeros.float())
        if self.scheme.activation.is_static:
            static = nn.Parameter(torch.zeros((), device=layer.weight.device))
        self.register_parameter("scales", scales)
        self.register_parameter("zeros", zeros)
        self.register_parameter("activation_scale", static)
        self.register_buffer("start_scales", None)

    @classmethod
    def from_quantized(cls, layer: WQLinear) -> FakeQuantLinear:
        """One that computes what a quantized layer does, and learns from there.

        Its scales and zero points are those of `layer`, and its weights, fp32, the numbers of the
        codes.

        Raises:
            SchemeError: for scales that are quantized themselves.
            WeightError: for what is beside codes, scales and zero points.
        """
        hub = layer.to_weight()
        if hub.scheme.scale_levels != "one":
            raise SchemeError(
                f"{hub.scheme}: scales that are quantized themselves are not learned: train the "
                'dense model with step="range"'
            )
        reason = _why_not_learned(hub)
        if reason is not None:
            raise WeightError(f"{reason}, which is not trained: train the dense model")
        # An nn.Linear of this weight, whose memory is not made twice.
        linear = nn.Linear(hub.k, hub.n, bias=False, device="meta").train(layer.training)
        linear.weight = nn.Parameter(hub.dequantize())
        if hub.bias is not None:
            linear.bias = nn.Parameter(hub.bias.clone())
        # Learned ones would be fitted to the weight first.
        made = cls(linear, hub.scheme, learn=False)
        made._dtype = layer.dtype
        for name in ("scales", "zeros", "activation_scale"):
            stored = getattr(hub, name)
            if stored is not None:
                setattr(made, name, nn.Parameter(stored.float().clone()))
        made.start_scales = hub.scales.float().clone()
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer that this one stands for; its weight may be finer."""
        return self.weight.dtype if self._dtype is None else self._dtype

    def forward(self, input: Tensor) -> Tensor:
        x = self._rounded_input(input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.fake_weight().to(x.dtype), bias)

    def fake_weight(self) -> Tensor:
        """W', fp32 [N, K], with gradients."""
        made: Tensor = _FakeWeight.apply(
            self.weight, self.scales, self.zeros, self.start_scales, self.scheme
        )
        return made

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What W' is stored as, bit for bit.

        Raises:
            SchemeError: where a static scale has met no batch yet.
        """
        parameters, codes = _encoded(
            self.weight, self.scales, self.zeros, self.start_scales, self.scheme
        )
        fields = dict(parameters.fields)
        if self.activation_scale is not None:
            if not float(self.activation_scale) > 0:
                raise SchemeError(
                    f"{self.scheme}: its scale of activations has met no batch: train, or run, the "
                    "model first"
                )
            fields["activation_scale"] = self.activation_scale.detach().float()
        bias = None if self.bias is None else self.bias.detach()
        return QuantizedWeight(scheme=self.scheme, codes=codes, bias=bias, **fields)

    def plain(self) -> nn.Linear:
        """An `nn.Linear` with the parameters of this one, unrounded."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        if self.start_scales is not None:
            assert self.scales is not None
            weight, moved = self.weight.detach().clone(), (self.scales / self.start_scales).detach()
            length = self.scheme.group_length(self.in_features)
            apply_by_group(weight, moved, length, Tensor.mul_)
            linear.weight = nn.Parameter(weight)
        return linear.to(self.dtype).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantLinear:
        if self._dtype is not None:
            self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.weight.device)).dtype
        return super()._apply(fn, recurse)

    def _rounded_input(self, x: Tensor) -> Tensor:
        scale = self.activation_scale
        if scale is None:
            return rounded_input(x, self.scheme)
        if not float(scale.detach()) > 0:
            with torch.no_grad():
                # LSQ's beginning, which is for few bits: with more, the largest |x| is less.
                magnitudes, largest = x.detach().float().abs(), self.scheme.activation.largest
                start = 2 * magnitudes.mean() / math.sqrt(largest)
                start = torch.minimum(start, magnitudes.max() / largest)
                scale.copy_(start.clamp(min=torch.finfo(torch.float32).tiny))
        learned: Tensor = _FakeInput.apply(x, scale, self.scheme)
        return learned


_LEARNED = frozenset({"scales", "zeros", "activation_scale"})
"""Fields of a weight that are learned, or stand for what is."""


def _why_not_learned(weight: QuantizedWeight) -> str | None:
    beside = [n for n, v in weight.fields.items() if v is not None and n not in _LEARNED]
    if beside:
        return f"the layer has {', '.join(beside)}"
    if weight.zeros is not None and weight.zeros.is_floating_point():
        return "the layer has zero points that are no integers"
    return None


def rounded_input(
    x: Tensor,
    scheme: QuantScheme,
    static: Tensor | None = None,
    zero: int | Tensor | None = None,
) -> Tensor:
    """x [..., K] as a layer multiplies it; its gradient is that of x.

    Args:
        static: the scale of static activations, fp32 [], or [P] of positions.
        zero: their zero point, of the same shape, or None.
    """
    if scheme.activation.dtype == "none":
        return x
    with torch.no_grad():
        if static is None:
            made = dynamically_rounded(x, scheme)
        else:
            rows = x.reshape(-1, x.shape[-1])
            if scheme.activation.by_position:
                places = positions.of_rows(x.shape, x.device)
                static = positions.at(static, places)
                if isinstance(zero, Tensor):
                    zero = positions.at(zero, places)[:, None]
            scale = static[..., None]
            if zero is not None:
                largest = scheme.activation.largest
                codes = quantize_with_zero(rows, scale, zero, largest).float() - zero
            else:
                codes = _symmetric(rows, scheme.activation, static)[0].float()
            made = (codes * scale).view(x.shape).to(x.dtype)
    return x + (made - x.detach())


def dynamically_rounded(x: Tensor, scheme: QuantScheme) -> Tensor:
    """x [..., K] as a layer multiplies it whose scales of activations come from x."""
    activation, rows = scheme.activation, x.reshape(-1, x.shape[-1])
    if activation.outliers:
        apart = outlier_columns(rows, activation.outliers)
        codes, scale = _symmetric(without_columns(rows, apart), activation)
        made = codes.float() * scale[:, None]
        made[:, apart] = rows[:, apart].float()
    elif activation.has_zeros:
        codes, scale, zero = quantize_rows_asymmetric(rows, activation.largest)
        made = (codes.float() - zero[:, None]) * scale[:, None]
    elif activation.granularity == "token":
        codes, scale = _symmetric(rows, activation)
        made = codes.float() * scale[:, None]
    else:
        one = tensor_scale(rows, activation.largest)
        codes, _ = _symmetric(rows, activation, one)
        made = codes.float() * one
    return made.view(x.shape).to(x.dtype)


def _symmetric(
    rows: Tensor, activation: Activation, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return quantize_rows(rows, activation.torch_dtype, scale, largest=activation.largest)


def _parameters(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, scheme: QuantScheme
) -> WeightParameters:
    """Of the fake weight, as they are stored; without those of activations."""
    own = scheme.dynamic
    if scales is None:
        return rounding.fit(weight.detach(), own)
    least = rounding.least_scale(own.scale_dtype)
    fields = {"scales": scales.detach().to(own.scale_dtype).clamp(min=least)}
    if zeros is not None:
        largest = (1 << own.bits) - 1
        fields["zeros"] = zeros.detach().round().clamp(0, largest).to(torch.uint8)
    n, k = weight.shape
    return WeightParameters(scheme=own, n=n, k=k, **fields)


def _encoded(
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    start: Tensor | None,
    scheme: QuantScheme,
) -> tuple[WeightParameters, Tensor]:
    """What the fake weight is stored as: its parameters, and its codes, uint8 [N, K]."""
    parameters = _parameters(weight, scales, zeros, scheme)
    coding = parameters if start is None else _parameters(weight, start, zeros, scheme)
    return parameters, rounding.encode_rows(weight.detach(), coding, 0)


class _FakeWeight(torch.autograd.Function):
    """The weight rounded, and the gradients of LSQ+."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scales: Tensor | None,
        zeros: Tensor | None,
        start: Tensor | None,
        scheme: QuantScheme,
    ) -> Tensor:
        parameters, codes = _encoded(weight, scales, zeros, start, scheme)
        made = parameters.dequantize_rows(codes, 0)
        ctx.start = start
        ctx.parameters, ctx.learns = parameters, (scales is not None, zeros is not None)
        ctx.save_for_backward(weight, made)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, made) = gradients, ctx.saved_tensors
        if not ctx.learns[0]:
            # The range reaches as far as any weight.
            return gradient.to(weight.dtype), None, None, None, None
        parameters = ctx.parameters
        scheme, (n, k) = parameters.scheme, weight.shape
        length, groups = scheme.group_length(k), scheme.groups(k)

        def grouped(values: Tensor) -> Tensor:
            return F.pad(values.float(), (0, groups * length - k)).unflatten(1, (groups, length))

        scale = rounding.nonzero(parameters.group_scales())[:, :, None]
        g, w = grouped(gradient), grouped(weight)
        stored = parameters.group_zeros()
        zero = torch.zeros_like(scale) if stored is None else stored[:, :, None]
        zero = zero + (scheme.implied_zero if scheme.weight.kind == "linear" else 0)
        begun = scale if ctx.start is None else rounding.nonzero(ctx.start.float())[:, :, None]
        inside = _is_inside(w / begun + zero, scheme)
        to_weight = None
        if ctx.needs_input_grad[0]:
            to_weight = (g * inside * (scale / begun)).flatten(1)[:, :k].to(weight.dtype)
        values = grouped(made) / scale
        share = 1 / math.sqrt(min(length, k) * (n if scheme.per_tensor else 1) * _largest(scheme))
        # What the weight keeps of it where it is held as a number, and not in units of its scale.
        kept = inside * w / begun if ctx.start is None else 0
        by_scale = (g * (values - kept)).sum(dim=2) * share
        by_zero = None
        if ctx.learns[1]:
            by_zero = (g * ~inside).sum(dim=2).neg() * scale[:, :, 0] * share
            by_zero = by_zero.sum_to_size(parameters.scales.shape)
        return to_weight, by_scale.sum_to_size(parameters.scales.shape), by_zero, None, None


def _is_inside(scaled: Tensor, scheme: QuantScheme) -> Tensor:
    """Which weights, in units of codes, no end of the range clips."""
    if scheme.weight.kind == "linear":
        return (scaled >= -0.5) & (scaled <= (1 << scheme.bits) - 0.5)
    return scaled.abs() <= scheme.weight.max_value


def _largest(scheme: QuantScheme) -> float:
    if scheme.weight.kind == "linear":
        return float((1 << scheme.bits) - 1 if not scheme.symmetric else 1 << (scheme.bits - 1))
    return scheme.weight.max_value


class _FakeInput(torch.autograd.Function):
    """x rounded under one scale that is learned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor:
        codes, _ = _symmetric(x.reshape(-1, x.shape[-1]), scheme.activation, scale.float())
        made = codes.float().mul_(scale).view(x.shape).to(x.dtype)
        ctx.largest = scheme.activation.largest
        ctx.save_for_backward(x, scale, made)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (x, scale, made) = gradients, ctx.saved_tensors
        scaled = x.float() / scale
        inside = scaled.abs() <= ctx.largest
        share = 1 / math.sqrt(max(1, x.numel()) * ctx.largest)
        moved = made.float() / scale - inside * scaled
        by_scale = (gradient.float() * moved).sum() * share
        return gradient * inside, by_scale.to(scale.dtype).reshape(()), None
