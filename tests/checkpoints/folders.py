"""Folders of single layers, without a model around them, and edits of saved ones."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qkernels.checkpoints import FORMATS
from qkernels.checkpoints.format import WeightKind
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

WRITTEN = tuple(name for name, row in FORMATS.items() if row.writes)
"""The formats in which models are saved."""


def holding(*schemes: str) -> list[str]:
    """The formats that are written and hold layers of these schemes side by side."""
    kinds = {text: WeightKind.of_scheme(QuantScheme.parse(text)) for text in schemes}
    return [name for name in WRITTEN if FORMATS[name].why_not_all(kinds) is None]


def write_layers(folder: Path, format: str, weights: Mapping[str, QuantizedWeight]) -> Path:
    """A folder of `format` that holds these layers and nothing else."""
    row = FORMATS[format]
    kinds = {name: WeightKind.of(weight) for name, weight in weights.items()}
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, weight in weights.items()
        for part, tensor in row.write_layer(weight).items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"quantization_config": row.write_config(kinds, [])}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether two weights agree in every bit and type."""
    if a.scheme != b.scheme or list(a.fields) != list(b.fields):
        return False
    pairs = [(a.codes, b.codes), *((a.fields[name], b.fields[name]) for name in a.fields)]
    if (a.bias is None) != (b.bias is None):
        return False
    if a.bias is not None:
        pairs.append((a.bias, b.bias))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata_of(folder))


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata() or {}


def edit_metadata(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    metadata = metadata_of(folder)
    change(metadata)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata)
