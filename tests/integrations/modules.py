"""Modules with the class names and tensors of other packages', made of files that these wrote."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).parents[1] / "golden"


def module_of(
    kind: str,
    tensors: dict[str, torch.Tensor],
    *,
    base: type[nn.Module] = nn.Module,
    where: str = "somewhere.qlinear",
    **attributes: Any,
) -> nn.Module:
    """A module of the class `kind` with these buffers, which computes nothing."""
    module = type(kind, (base,), {"__module__": where})()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    vars(module).update(attributes)
    return module


def golden(folder: str, layer: str = "layer") -> tuple[dict[str, torch.Tensor], torch.Tensor, Any]:
    """The tensors of a layer, its weight as the package dequantized it, quantization_config."""
    files = sorted((GOLDEN / folder).glob("model*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    mine = {
        name.removeprefix(f"{layer}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{layer}.")
    }
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    weight = load_file(GOLDEN / folder / "oracle.safetensors")[f"{layer}.weight"]
    return mine, weight, config.get("quantization_config")


def packed_linear(kind: str, folder: str, layer: str = "layer", **more: Any) -> nn.Module:
    """A module of AutoAWQ or of a GPTQ package, with the attributes that these have."""
    tensors, _, config = golden(folder, layer)
    if "g_idx" in tensors:
        k = len(tensors["g_idx"])
    else:
        rows, columns = tensors["qweight"].shape
        k = {"GEMM": rows, "GEMV": 8 * columns}.get(kind.rpartition("_")[2], columns)
    size = config["group_size"]
    attributes = {
        "bits": config["bits"],
        "w_bit": config["bits"],
        "group_size": k if size == -1 else size,
        "in_features": k,
        **more,
    }
    return module_of(kind, tensors, **attributes)


def compressed_linear(folder: str, layer: str, status: str = "compressed") -> nn.Linear:
    """A module of compressed-tensors: an nn.Linear with other parameters and a scheme."""
    tensors, _, config = golden(folder, layer)
    group = next(
        group
        for group in config["config_groups"].values()
        if ("weight_packed" in tensors) == ("pack" in (group.get("format") or config["format"]))
    )
    linear = nn.Linear(1, 1, bias=False)
    del linear.weight
    for name, tensor in tensors.items():
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
    entries = dict(group, format=None)
    linear.quantization_scheme = SimpleNamespace(
        weights=group["weights"], model_dump=lambda mode: entries
    )
    linear.quantization_status = SimpleNamespace(value=status)
    return linear
