"""`WQRows`: a linear layer whose outputs are those of several, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import scale_all
from qkernels.modules.view import Source, WeightView


def part_name(number: int) -> str:
    """The name of a layer in its `WQRows`."""
    return f"part_{number}"


def whole_name(name: str) -> str:
    """The name of the `WQRows` that a layer is a part of, or its own where it is none."""
    return re.sub(r"\.part_\d+$", "", name)


class WQRows(nn.Module):
    """Layers [N_i, K] as one [N, K], N the sum of N_i: part_0, part_1, ...

    For rows that no single `WQLinear` holds exactly, such as two projections that a model has as
    one, quantized with their columns in different orders.

    Attributes:
        in_features, out_features: K and N.
    """

    def __init__(self, layers: Iterable[WQLinear]) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(part_name(number), layer)
        self.in_features = self.layers[0].in_features
        self.out_features = sum(layer.out_features for layer in self.layers)

    @property
    def layers(self) -> list[WQLinear]:
        """In their order."""
        return list(self._modules.values())  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that it stands for."""
        return self.layers[0].dtype

    @property
    def weight(self) -> Tensor:
        """What stands for the weight: [N, K]."""
        if torch.compiler.is_compiling():
            return self.dequantize().to(self.dtype)
        shape = (self.out_features, self.in_features)
        return WeightView(self, shape, self.dtype, self.layers[0].weight.device)

    @property
    def bias(self) -> Tensor | None:
        """[N], of all parts, or None."""
        biases = [layer.bias for layer in self.layers]
        return None if any(b is None for b in biases) else torch.cat(biases)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """y [..., N] for x [..., K]."""
        return torch.cat([layer(input) for layer in self.layers], dim=-1)

    def dequantize(self) -> Tensor:
        """The weight as fp32 [N, K]."""
        return torch.cat([layer.dequantize() for layer in self.layers])

    def view_values(self) -> Tensor:
        """For `WeightView`."""
        return self.dequantize()

    def view_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """For `WeightView`: without the layer's own bias."""
        products = [nn.functional.linear(x, layer.weight) for layer in self.layers]
        y = torch.cat(products, dim=-1)
        return y if bias is None else y + bias

    def view_scale(self, factor: float) -> None:
        """For `WeightView`: multiplies every part in place, or none."""
        scale_all(self.layers, factor)

    def view_entry(self, number: int) -> Source:
        """For `WeightView`."""
        raise AssertionError("one weight has no entries")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
