"""Models and outputs side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qkernels as qk
from qkernels.modules.experts import WQExperts


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative Frobenius error of an output, where `want` is finite.

    Infinite where shapes differ, or where what is finite there is not.
    """
    worst = 0.0
    for name, exact in want.items():
        if got[name].shape != exact.shape:
            return float("inf")
        finite = exact.isfinite()
        wanted, have = exact[finite].double(), got[name][finite].double()
        if not have.isfinite().all():
            return float("inf")
        norm = float(wanted.norm())
        worst = max(worst, float((have - wanted).norm()) / norm if norm else 0.0)
    return worst


def same_weights(
    dense: PreTrainedModel, model: PreTrainedModel, report: qk.QuantizationReport
) -> PreTrainedModel:
    """`dense` with the dequantized weights of `model` in place of its own."""
    for layer in report.layers:
        packed = model.get_submodule(layer.name)
        assert isinstance(packed, qk.WQLinear)
        weight = packed.dequantize()
        whole, _, number = layer.name.rpartition(".")
        experts = model.get_submodule(whole)
        if isinstance(experts, WQExperts):
            stack = dense.get_parameter(whole).data
            place = [name for name, _ in experts.named_children()].index(number)
            stack[place] = weight.T if experts.transposed else weight
        else:
            owner = dense.get_submodule(layer.name)
            assert isinstance(owner.weight, Tensor)
            weight = (weight.T if packed.transposed else weight).to(owner.weight.dtype)
            # A parameter of its own, since that of a head may be the embedding's.
            owner.weight = nn.Parameter(weight.contiguous())
    return dense


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> each parameter and buffer, those that are not saved included."""
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def shared(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of each parameter, and of each quantized layer, that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, qk.WQLinear):
            names.setdefault(id(module), []).append(name)
    return {tuple(sorted(group)) for group in names.values() if len(group) > 1}


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
