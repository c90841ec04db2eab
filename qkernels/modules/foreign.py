"""Layers that another package quantized, known by what they hold: no package is imported."""

from __future__ import annotations

import torch
from torch import nn

from qkernels.modules.awq import _AwqLinear
from qkernels.modules.linear import WQLinear

_TENSORS = (
    *("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "W_q", "SCB"),
    *("dense_weights", "gate_up_proj_blocks", "down_proj_blocks"),
)
"""Tensors that none but a quantized layer has: AWQ's and GPTQ's, those of compressed-tensors and
float8, HQQ's, LLM.int8()'s, SpQR's, and those of Transformers' MXFP4 experts."""

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _holds_words(module: nn.Module) -> bool:
    """Whether a module has tensors under names that none but quantized layers use.

    The `B` of Marlin's layers is known by its integers.
    """
    held = {**module._parameters, **module._buffers}
    marlin = held.get("B")
    integers = marlin is not None and not marlin.is_floating_point()
    return integers or any(held.get(name) is not None for name in _TENSORS)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module holds quantized weights and is none of ours."""
    if isinstance(module, WQLinear):
        return False
    # torch.ao's modules keep theirs in an object.
    if (
        isinstance(module, _AwqLinear)
        or _holds_words(module)
        or "_packed_params" in module._modules
    ):
        return True
    weight = module._parameters.get("weight")
    if weight is not None and (not _holds_numbers(weight.dtype) or hasattr(weight, "quant_state")):
        return True
    # torchao's tensors say that they are bf16, and flatten into these.
    return any(hasattr(p, "tensor_data_names") for p in module._parameters.values())


def _holds_numbers(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype not in _FLOAT8


def foreign_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that another package quantized, by name."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if is_foreign(module)}


def why_foreign(name: str, module: nn.Module) -> str:
    """What is said of one: what it is, and what makes it one of ours."""
    return (
        f"{name or 'the model'} is a {type(module).__name__} with weights that another package "
        "quantized: qk.replace_linears(model), right after loading, puts ours in its place, or "
        "says why not"
    )
