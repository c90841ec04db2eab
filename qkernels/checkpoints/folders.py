"""A quantized Transformers model as a folder, and back: config.json and model.safetensors."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qkernels.checkpoints import compressed_tensors
from qkernels.errors import CheckpointError
from qkernels.modules.linear import WQLinear
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

WEIGHTS_FILE = "model.safetensors"
FORMATS = ("compressed-tensors",)


def save_model(model: Any, folder: str | Path, format: str = "compressed-tensors") -> None:
    """Writes a Transformers model whose linear layers are `WQLinear` to a new folder.

    Args:
        model: a `transformers.PreTrainedModel`.
        folder: created where it is missing; must be empty.
        format: "compressed-tensors".

    Raises:
        CheckpointError: for a folder with files in it, an unknown format, or a scheme that the
            format does not hold. Nothing is written then.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise CheckpointError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder")
    schemes, tensors, ignored = {}, {}, []
    quantized: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WQLinear):
            compressed_tensors.format_of(module.scheme)
            schemes[name] = module.scheme
            quantized.append(name + ".")
        elif isinstance(module, nn.Linear):
            ignored.append(name)
    if not schemes:
        raise CheckpointError("the model has no WQLinear layer: quantize it first")
    for name in schemes:
        layer = compressed_tensors.write_layer(model.get_submodule(name).to_weight())
        tensors.update({f"{name}.{part}": tensor.cpu() for part, tensor in layer.items()})
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        # Tied weights are stored once, under the first of their names.
        if not name.startswith(tuple(quantized)) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    config = model.config.to_dict()
    config["quantization_config"] = compressed_tensors.write_config(schemes, ignored)
    config["architectures"] = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, default=lambda value: str(value).removeprefix("torch."))
    (folder / "config.json").write_text(text + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        CheckpointError: where there is none, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give the folder of a saved model")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def is_quantized(folder: str | Path) -> bool:
    """Whether the config.json in `folder` has a quantization_config."""
    return bool(read_config(folder).get("quantization_config"))


def read_weights(folder: str | Path) -> dict[str, QuantizedWeight]:
    """Every quantized layer of a model folder, by name.

    Raises:
        CheckpointError: for files that are missing or damaged, or formats that are not supported.
    """
    quantized, _ = _read(Path(folder))
    return quantized


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Any:
    """The Transformers model in `folder`, with `WQLinear` layers packed for `device`.

    Raises:
        CheckpointError: for files that are missing or damaged, or formats that are not supported.
    """
    folder = Path(folder)
    quantized, dense = _read(folder)
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(f"loading needs {error.name}: pip install qkernels[models]") from None
    raw = {key: value for key, value in read_config(folder).items() if key != "quantization_config"}
    try:
        config = transformers.AutoConfig.for_model(**raw)
        architecture = getattr(transformers, raw["architectures"][0])
        model = architecture._from_config(config, dtype=getattr(config, "dtype", None))
    except (KeyError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} describes no known model: {error}"
        ) from None
    for name, weight in quantized.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"the model has no layer {name}, which is in the file") from None
        if tuple(linear.weight.shape) != weight.shape:
            raise CheckpointError(
                f"{name} is {list(weight.shape)} in the file and {list(linear.weight.shape)} in "
                "the model's config"
            )
        model.set_submodule(name, WQLinear.from_weight(weight, device=device))
    result = model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    parts = tuple(name + "." for name in quantized)
    missing = [key for key in result.missing_keys if not key.startswith(parts) and key not in tied]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit the model: missing {missing[:3]}, "
            f"unexpected {result.unexpected_keys[:3]}"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


def _read(folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    config = read_config(folder).get("quantization_config")
    if not config:
        raise CheckpointError(f"{folder / 'config.json'} has no quantization_config")
    method = config.get("quant_method")
    if method not in FORMATS:
        raise CheckpointError(
            f"{folder} is in the format {method!r}; supported are {', '.join(FORMATS)}"
        )
    tensors = _read_tensors(folder)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{folder / 'config.json'} has no config_groups")
    schemes = {key: compressed_tensors.read_scheme(group) for key, group in groups.items()}
    names = [key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")]
    quantized = {}
    for name in names:
        scheme = _scheme_for(name, groups, schemes)
        parts = {
            part: tensors.pop(f"{name}.{part}")
            for part in compressed_tensors.TENSOR_NAMES
            if f"{name}.{part}" in tensors
        }
        quantized[name] = compressed_tensors.read_layer(name, parts, scheme)
    if not quantized:
        raise CheckpointError(f"{folder} holds no quantized layer")
    return quantized, tensors


def _scheme_for(
    name: str, groups: Mapping[str, Any], schemes: Mapping[str, QuantScheme]
) -> QuantScheme:
    for key, group in groups.items():
        for target in group.get("targets", ()):
            is_pattern = target.startswith("re:")
            if target in (name, "Linear") or (is_pattern and re.match(target[3:], name)):
                return schemes[key]
    raise CheckpointError(f"{name} is quantized, but no config group names it")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from None
    return tensors
