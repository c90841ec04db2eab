"""What quantization did to each layer, measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.modules.packed import PackedModule
from qkernels.preparation import with_scales_at
from qkernels.weight import row_slices


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        weight_error: |W - dequantized| / |W|, Frobenius; W as the method was given it.
        output_error: |y - quantized y| / |y| over a sample of its calibration inputs, or None
            without any.
        bits_per_weight: all bytes of the packed weight but the bias, in bits over N * K.
        method: the part of the recipe that quantized it.
        shares: the layer whose packed weight it has, in whose memory it is; None where it has its
            own. Of embeddings, whose `n` is the size of the vocabulary.
    """

    name: str
    scheme: str
    n: int
    k: int
    weight_error: float
    output_error: float | None
    bits_per_weight: float
    method: str = "rtn"
    shares: str | None = None


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did.

    Attributes:
        method: the recipe, in its canonical spelling.
        layers: the quantized ones, in the model's order; embeddings come last.
        skipped: linear layers that were left alone, and whatever else has more than a small share
            of the model's parameters -> the reason.
        shares: name in `skipped` -> its part of the model's parameters, from 0 to 1.
        unreached: layers that got no calibration input -> what was done instead of the recipe.
        whole_model: why each block was calibrated by running all of the model, or None where it
            could be taken block by block.
    """

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)
    whole_model: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all quantized weights, their scales included."""
        return round(sum(r.bits_per_weight * r.n * r.k for r in self._stored) / 8)

    @property
    def numbers(self) -> int:
        """How many weights all of them have, each counted once."""
        return sum(r.n * r.k for r in self._stored)

    @property
    def _stored(self) -> list[LayerReport]:
        return [report for report in self.layers if report.shares is None]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all quantized weights."""
        return 8 * self.weight_bytes / max(1, self.numbers)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "method": self.method,
            "bits_per_weight": self.bits_per_weight,
            "weight_bytes": self.weight_bytes,
            "layers": [asdict(report) for report in self.layers],
            "skipped": dict(self.skipped),
            "shares": dict(self.shares),
            "unreached": dict(self.unreached),
            "whole_model": self.whole_model,
        }


def compare(
    name: str,
    layer: nn.Linear | nn.Embedding,
    packed: PackedModule,
    rows: Tensor | None,
    method: str,
    input_factor: Tensor | None = None,
    places: Tensor | None = None,
) -> LayerReport:
    """The report of one layer, with its errors measured.

    Args:
        rows: [R, K], inputs of a linear layer to measure the output's error on.
        input_factor: fp32 [K], what they were multiplied by and the weight divided, which the
            packed layer does itself.
        places: int64 [R], the positions of the rows, for a layer with scales per position.
    """
    weight, held = layer.weight.detach(), packed.packed
    parameters = held.parameters()
    wrong = total = 0.0
    for start, stop in row_slices(*weight.shape):
        original = weight[start:stop].float()
        if input_factor is not None:
            # As it goes with x itself, which is what the packed layer takes.
            original = original * input_factor
        approximate = parameters.to_column_order(held.dequantize_rows(start, stop))
        wrong += float((approximate - original).norm()) ** 2
        total += float(original.norm()) ** 2
    output_error = None
    if rows is not None:
        with torch.no_grad():
            # Under autocast it may have met them in another type.
            rows = rows.to(layer.weight.dtype)
            bias = layer.bias if isinstance(layer, nn.Linear) else None
            exact = nn.functional.linear(rows, layer.weight, bias).double()
            own = rows if input_factor is None else rows.float() / input_factor
            if places is None:
                got = packed(own).double()
            else:
                by_row = with_scales_at(held, places.to(held.device))
                own_bias = packed._buffers.get("bias")
                got = ops.linear(own, by_row, own_bias, backend=packed.backend).double()
        output_error = _relative(float((got - exact).norm()), float(exact.norm()))
    return LayerReport(
        name=name,
        scheme=str(packed.scheme),
        n=held.n,
        k=held.k,
        weight_error=_relative(wrong**0.5, total**0.5),
        output_error=output_error,
        bits_per_weight=8 * held.nbytes / (held.n * held.k),
        method=method,
    )


def _relative(difference: float, norm: float) -> float:
    return difference / norm if norm else difference
