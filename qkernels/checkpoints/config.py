"""JSON files of a model folder, and their values, checked as they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qkernels.errors import CheckpointError

Config = Mapping[str, Any]
"""The parsed config.json."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""Where config.json says how the model is quantized; the second is what compressed-tensors wrote at
first."""

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: where the file cannot be read, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    # Damaged JSON, text that is not UTF-8, numbers or nesting beyond what Python takes.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_config(folder: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        CheckpointError: where there is none, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give the folder of a saved model")
    try:
        return {key: _with_floats(value) for key, value in read_json(path).items()}
    except RecursionError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _with_floats(value: Any) -> Any:
    """A value of config.json, with the numbers that JSON does not have and Transformers writes as
    {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and isinstance(value["__float__"], str):
            return _FLOATS.get(value["__float__"], value)
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def quantization_of(config: Config) -> dict[str, Any] | None:
    """The quantization_config of a config.json, or None where the model is not quantized.

    Raises:
        CheckpointError: where it is no object.
    """
    for key in QUANTIZATION_KEYS:
        if config.get(key):
            return typed(config[key], dict, key)
    return None


def quant_method(config: Config) -> str | None:
    """What the quantization_config calls its format, or None."""
    section = quantization_of(config)
    method = None if section is None else section.get("quant_method")
    return method if isinstance(method, str) else None


def typed(value: object, kind: type[T], where: str) -> T:
    """`value`, which must be a `kind`; True is no int here.

    Raises:
        CheckpointError: naming `where` it stands, its value and the type.
    """
    if isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    names = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "a bool"}
    raise CheckpointError(f"{where} must be {names[kind]}, got {brief(value)}")


def strings(value: object, where: str) -> list[str]:
    """`value`, which must be a list of strings."""
    return [typed(item, str, f"{where}[{i}]") for i, item in enumerate(typed(value, list, where))]


def only(section: Config, known: frozenset[str], where: str) -> None:
    """Raises CheckpointError where `section` has a key outside of `known`, naming it."""
    unknown = sorted(str(key) for key in section if key not in known)
    if unknown:
        raise CheckpointError(
            f"{where} has {unknown[0]}={brief(section[unknown[0]])}, which is not known here, so "
            "the model might be read wrongly: update qkernels, or take it out where it changes "
            "nothing"
        )


def brief(value: object) -> str:
    """`value` in at most 60 characters."""
    return shortened(repr(value), 60)


def shortened(text: object, most: int = 300) -> str:
    """The first line of a text that others wrote, in at most so many characters."""
    line = str(text).strip().partition("\n")[0]
    return line if len(line) <= most else line[: most - 3] + "..."
