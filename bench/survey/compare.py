"""Models and outputs side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qkernels as qk
from qkernels.modules.experts import WQExperts


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error where `want` is finite.

    Infinite where the shapes differ, or where what is finite in `want` is not.
    """
    if got.shape != want.shape:
        return float("inf")
    finite = want.isfinite()
    wanted, have = want[finite].double(), got[finite].double()
    if not have.isfinite().all():
        return float("inf")
    norm = float(wanted.norm())
    return float((have - wanted).norm()) / norm if norm else float(have.norm())


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of an output; both have the same ones."""
    return max(relative_error(got[name], exact) for name, exact in want.items())


def take_weights(dense: PreTrainedModel, model: PreTrainedModel) -> dict[str, float]:
    """Gives the dense layers of `dense` the dequantized weights of those of `model`.

    Returns the relative error of each weight, by the name of its layer.
    """
    errors: dict[str, float] = {}
    for name, packed in model.named_modules():
        if not isinstance(packed, qk.WQLinear):
            continue
        whole, _, entry = name.rpartition(".")
        weight, experts = packed.dequantize(), model.get_submodule(whole)
        if isinstance(experts, WQExperts):
            place = [child for child, _ in experts.named_children()].index(entry)
            old = dense.get_parameter(whole).data[place]
            new = (weight.T if experts.transposed else weight).to(old.dtype)
            errors[name] = relative_error(new, old)
            old.copy_(new)
        else:
            owner = dense.get_submodule(name)
            assert isinstance(owner.weight, Tensor)
            new = (weight.T if packed.transposed else weight).to(owner.weight.dtype)
            errors[name] = relative_error(new, owner.weight.data)
            # A parameter of its own, since that of a head may be the embedding's.
            owner.weight = nn.Parameter(new.contiguous())
    return errors


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> each parameter and buffer, those that are not saved included."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
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
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
