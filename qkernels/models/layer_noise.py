"""Signal to noise of each quantized layer, on the inputs that the layer has in the dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.modules import WQLinear
from qkernels.modules.experts import fused_experts
from qkernels.modules.kinds import is_plain_linear, linear_parts
from qkernels.quantizers.linear_forms import LinearForms

_RESCALED_CORRELATION = 0.9
"""Of a quantized weight with the dense one and its factors, to tell those from noise: signs alone
have 0.8."""

_EXPLAINED = 0.25
"""The part of the difference of two weights that factors must explain to be taken out. Of the
noise of random weights they explain up to 0.06 at 3 and 4 bits and 0.16 at 2. Less than this costs
1.2 dB at most."""

_SAME_CORRELATION = 0.25
"""Of a whole quantized weight with the dense one: below, they are not one weight. Signs of weights
with long tails have 0.4."""

_FACTOR_ROUNDS = 4


@dataclass(frozen=True)
class LayerNoise:
    """The noise of a quantized layer.

    Attributes:
        snr_db: 10 log10(|y|^2 / |y - yq|^2), y and yq the outputs of the dense and the quantized
            layer on the inputs that the dense model gives it; infinite where they are the same.
    """

    name: str
    scheme: str
    snr_db: float


class NoiseMeter:
    """Measures layers of `quantized` while `dense` runs inside of a `with` block.

    Methods such as AWQ multiply the columns and rows of layers, and what is around them by the
    inverse. Those factors are found from the weights and taken out again. Beside noise of the size
    that one bit has they cannot be told, and such layers seem worse than they are.

    Attributes:
        not_compared: quantized layers that have no counterpart to measure -> the reason.
    """

    def __init__(self, dense: nn.Module, quantized: nn.Module) -> None:
        self.not_compared: dict[str, str] = {}
        self._dense = dense
        self._layers = {n: m for n, m in quantized.named_modules() if isinstance(m, WQLinear)}
        self._energies: dict[str, list[float]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._forms: LinearForms | None = None

    def __enter__(self) -> NoiseMeter:
        modules = dict(self._dense.named_modules(remove_duplicate=False))
        fused = fused_experts(self._dense)
        names = []
        for name in self._layers:
            plain = name in modules and is_plain_linear(modules[name])
            if plain or name.rpartition(".")[0] in fused:
                names.append(name)
            else:
                self.not_compared[name] = "the dense model has no linear layer of this name"
        self._forms = LinearForms(self._dense, names)
        try:
            for name in names:
                self._observe(name)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        for name in self._layers:
            if name not in self._energies:
                self.not_compared.setdefault(name, "no token reached it")

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        assert self._forms is not None
        self._forms.undo()

    def results(self) -> list[LayerNoise]:
        """Of the layers that were measured, in the quantized model's order."""
        return [
            LayerNoise(name, str(layer.scheme), decibels(*self._energies[name]))
            for name, layer in self._layers.items()
            if name in self._energies
        ]

    def _observe(self, name: str) -> None:
        module, layer = self._dense.get_submodule(name), self._layers[name]
        weight = linear_parts(module).weight.detach()
        if weight.shape != (layer.out_features, layer.in_features):
            self.not_compared[name] = (
                f"the dense layer is {list(weight.shape)}, "
                f"this one {[layer.out_features, layer.in_features]}"
            )
            return
        found = factors(weight.float(), layer.dequantize().to(weight.device))
        if found is None:
            self.not_compared[name] = "its weight is rotated, or that of another model"
            return
        rows, columns = found
        device = layer.weight.device

        def add(module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
            x: Tensor = args[0] if args else kwargs["input"]
            got = layer((x / columns.to(x.dtype)).to(device)).to(y.device).float() / rows
            exact = y.float()
            energies = self._energies.setdefault(name, [0.0, 0.0])
            energies[0] += float(exact.square().sum(dtype=torch.float64))
            energies[1] += float((exact - got).square().sum(dtype=torch.float64))

        self._hooks.append(module.register_forward_hook(add, with_kwargs=True))


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def factors(dense: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of rows [N] and columns [K] that `quantized` [N, K] was made with; else 1.

    By least squares, in turns: quantized is about rows[:, None] * dense * columns. None where the
    two have little in common.

    Args:
        dense: fp32, and so is `quantized`.
    """
    squares, products = dense.square(), dense * quantized
    rows, columns = dense.new_ones(len(dense)), dense.new_ones(dense.shape[1])
    for _ in range(_FACTOR_ROUNDS):
        columns = _ratio(products.t() @ rows, squares.t() @ rows.square())
        rows = _ratio(products @ columns, squares @ columns.square())
    scaled = rows[:, None] * dense * columns
    explains = (quantized - scaled).norm() ** 2 < (1 - _EXPLAINED) * (quantized - dense).norm() ** 2
    if explains and _correlation(scaled, quantized) > _RESCALED_CORRELATION:
        return rows, columns
    if _correlation(dense, quantized) < _SAME_CORRELATION:
        return None
    return torch.ones_like(rows), torch.ones_like(columns)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where that is no positive number."""
    quotient = a / b
    return torch.where(quotient.isfinite() & (quotient > 0), quotient, 1.0)


def _correlation(a: Tensor, b: Tensor) -> float:
    """<a, b> / (|a| |b|); 1 where one of them is zero."""
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm else 1.0
