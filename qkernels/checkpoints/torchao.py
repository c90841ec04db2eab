"""The format of torchao: tensor subclasses, flattened into safetensors files.

The files' own metadata says of each tensor <layer>.weight what class it is, as JSON: "_type",
"_data" with its attributes, and "_tensor_data_names" of the parts in which it is stored:

Int8Tensor                _weight_qdata int8 [N, K], _weight_scale and _weight_zero_point
IntxUnpackedToInt8Tensor  the same of 1 to 8 bits in int8, of which target_dtype says how many
Float8Tensor              _weight_qdata float8 [N, K], _weight_scale

Scales and zero points are [N / rows, K / columns], with block_size = [rows, columns]:
w = (qdata - zero_point) * scale. Codes of int8 tensors are signed.

Int4Tensor and Int4TilePackedTo4dTensor compute w = q * s + z with a real z, which is no
s * (q - z') to the last bit: they are refused, as are classes whose values no scheme has.
Source: the torchao package (Meta, BSD-3-Clause), read as documentation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.checkpoints.config import Config, brief, only, quantization_of, strings, typed
from qkernels.checkpoints.format import Format, StoredLayer, only_read, says_method
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import WEIGHT_TYPES, Activation, QuantScheme
from qkernels.weight import QuantizedWeight

NAME = "torchao"

_KEYS = frozenset(
    (
        *("quant_method", "quant_type", "modules_to_not_convert"),
        # Which layers are quantized, which the tensors say.
        *("include_input_output_embeddings", "untie_embedding_weights"),
    )
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _Class:
    """A class of tensors that is read.

    Attributes:
        parts: those it may have beside qdata and scale.
        attributes: those it may have; what an unknown one would change is not known.
        dtype: of its qdata.
        weight: (attributes, where) -> the name of the weight type that holds it, and its bits.
        activation: (attributes, where) -> how inputs are quantized.
    """

    parts: frozenset[str]
    attributes: frozenset[str]
    dtype: torch.dtype
    weight: Callable[[Config, str], tuple[str, int]]
    activation: Callable[[Config, str], Activation]


@dataclass(frozen=True)
class _About:
    """What is remembered of a layer: bits of its codes, or 0 where they are float8."""

    bits: int
    zeros: bool


def _type_and_data(value: object, where: str) -> tuple[str, Any]:
    """A value that the metadata spells as {"_type": ..., "_data": ...}."""
    entry = typed(value, dict, where)
    return typed(entry.get("_type"), str, f"{where}: _type"), entry.get("_data")


def _intx_weight(data: Config, where: str) -> tuple[str, int]:
    _, name = _type_and_data(data.get("target_dtype"), f"{where}: target_dtype")
    held = {
        f"int{bits}": (next(h for h in (2, 3, 4, 8) if h >= bits), bits) for bits in range(1, 9)
    }
    if not isinstance(name, str) or name not in held:
        raise CheckpointError(f"{where}: target_dtype {brief(name)} is not one of int1 to int8")
    return f"int{held[name][0]}", held[name][1]


def _intx_activation(data: Config, where: str) -> Activation:
    if data.get("activation_quantization"):
        raise CheckpointError(
            f"{where}: inputs quantized as {brief(data['activation_quantization'])} are not "
            "supported: quantize for weights alone"
        )
    return Activation()


def _dynamic(kind: str, dtype: str) -> Callable[[Config, str], Activation]:
    """Inputs as `act_quant_kwargs` of the class `kind` says."""

    def activation(data: Config, where: str) -> Activation:
        if data.get("act_quant_kwargs") is None:
            return Activation()
        where = f"{where}: act_quant_kwargs"
        name, arguments = _type_and_data(data["act_quant_kwargs"], where)
        arguments = typed(arguments, dict, where)
        granularity, about = _type_and_data(arguments.get("granularity"), f"{where}: granularity")
        mapping = arguments.get("mapping_type") or {"_type": "MappingType", "_data": "SYMMETRIC"}
        symmetric = _type_and_data(mapping, f"{where}: mapping_type")[1] == "SYMMETRIC"
        bounds = [key for key in ("hp_value_lb", "hp_value_ub") if arguments.get(key) is not None]
        along = about.get("dim", -1) if isinstance(about, dict) else -1
        ways = {"PerRow": "token", "PerTensor": "tensor"}
        if name != kind or not symmetric or granularity not in ways or bounds or along != -1:
            raise CheckpointError(
                f"{where}: inputs quantized as {brief(arguments)} are not supported: symmetric "
                "ones, PerRow or PerTensor, are"
            )
        return Activation(dtype, ways[granularity])

    return activation


_CLASSES = {
    "Int8Tensor": _Class(
        parts=frozenset(("zero_point",)),
        attributes=frozenset(("block_size", "dtype", "act_quant_kwargs", "reduce_range")),
        dtype=torch.int8,
        weight=lambda data, where: ("int8", 8),
        activation=_dynamic("QuantizeTensorToInt8Kwargs", "int8"),
    ),
    "IntxUnpackedToInt8Tensor": _Class(
        parts=frozenset(("zero_point",)),
        attributes=frozenset(("block_size", "dtype", "target_dtype", "activation_quantization")),
        dtype=torch.int8,
        weight=_intx_weight,
        activation=_intx_activation,
    ),
    "Float8Tensor": _Class(
        parts=frozenset(),
        attributes=frozenset(
            ("block_size", "dtype", "act_quant_kwargs", "mm_config", "kernel_preference")
        ),
        dtype=torch.float8_e4m3fn,
        weight=lambda data, where: ("fp8e4m3", 0),
        activation=_dynamic("QuantizeTensorToFloat8Kwargs", "fp8"),
    ),
}

_CLASS_OF_CONFIG = {
    "Int8WeightOnlyConfig": "Int8Tensor",
    "Int8DynamicActivationInt8WeightConfig": "Int8Tensor",
    "IntxWeightOnlyConfig": "IntxUnpackedToInt8Tensor",
    "Float8WeightOnlyConfig": "Float8Tensor",
    "Float8DynamicActivationFloat8WeightConfig": "Float8Tensor",
}


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = quantization_of(config) or {}
    only(section, _KEYS, "quantization_config")
    skipped = set(strings(section.get("modules_to_not_convert") or [], "modules_to_not_convert"))
    layers: dict[str, StoredLayer] = {}
    for key, text in store.metadata.items():
        if not text.startswith("{"):
            continue
        where = f"{store.folder}: metadata of {key}"
        about = _parsed(text, where)
        kind = typed(about.get("_type"), str, f"{where}: _type")
        if kind == "Tensor":
            continue
        name, _, part = key.rpartition(".")
        if part != "weight":
            raise CheckpointError(f"{where}: a quantized {part or key} is not supported")
        if name in skipped:
            raise CheckpointError(
                f"{name} is quantized in the file, and modules_to_not_convert names it"
            )
        _check_said(section, kind, name)
        layers[name] = _plan_layer(store, name, kind, about, where)
    taken = {tensor for layer in layers.values() for tensor in layer.tensors}
    stray = next((key for key in store if "._weight_" in key and key not in taken), None)
    if stray is not None:
        raise CheckpointError(
            f"{store.folder}: the metadata of the safetensors files says nothing of {stray}: save "
            "the model anew with torchao's flatten_tensor_state_dict or save_pretrained"
        )
    return layers


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return typed(json.loads(text), dict, where)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None


def _check_said(section: Config, kind: str, name: str) -> None:
    """Raises where the config quantizes to another class than the tensors are of."""
    default = typed(section.get("quant_type") or {}, dict, "quant_type").get("default") or {}
    said = typed(default, dict, "quant_type.default").get("_type")
    wanted = _CLASS_OF_CONFIG.get(said) if isinstance(said, str) else None
    if wanted not in (None, kind):
        raise CheckpointError(f"quantization_config says {said}, and {name}.weight is of {kind}")


def _plan_layer(
    store: Store, name: str, kind: str, about: dict[str, Any], where: str
) -> StoredLayer:
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{where}: the class {kind} is not supported: no scheme has its numbers to the last "
            f"bit; supported are {', '.join(_CLASSES)}"
        )
    row, data = _CLASSES[kind], typed(about.get("_data"), dict, f"{where}: _data")
    only(data, row.attributes, where)
    parts = strings(about.get("_tensor_data_names"), f"{where}: _tensor_data_names")
    beyond = sorted(set(parts) - row.parts - {"qdata", "scale"})
    if beyond:
        raise CheckpointError(f"{where}: {beyond[0]} of a {kind} is not supported")
    keys = {part: f"{name}._weight_{part}" for part in ("qdata", "scale", "zero_point")}
    shape = store.shape(keys["qdata"])
    if len(shape) != 2:
        raise CheckpointError(f"{store.folder}: {keys['qdata']} must be [N, K], got {list(shape)}")
    weight, bits = row.weight(data, where)
    # The metadata does not say whether zero points are all zero, which most are.
    zeros = "zero_point" in parts and bool(store.get(keys["zero_point"]).any())
    group = _group_size(data.get("block_size"), shape, where)
    try:
        scheme = QuantScheme(
            WEIGHT_TYPES[weight],
            group_size=group,
            per_tensor=group is None and store.shape(keys["scale"]) != (shape[0], 1),
            symmetric=not zeros,
            activation=row.activation(data, where),
            scale_dtype=store.dtype(keys["scale"]),
        )
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from None
    tensors = (*(keys[part] for part in ("qdata", "scale", "zero_point")), f"{name}.bias")
    return StoredLayer(scheme, tuple(t for t in tensors if t in store), _About(bits, zeros))


def _group_size(value: object, shape: tuple[int, ...], where: str) -> int | None:
    """Columns that share a scale, or None for all of a row and for all rows."""
    where = f"{where}: block_size"
    sizes = [typed(size, int, where) for size in typed(value, list, where)]
    n, k = shape
    if sizes in ([1, k], [n, k], [-1, -1], []):
        return None
    if len(sizes) != 2 or sizes[0] != 1 or sizes[1] < 1 or k % sizes[1]:
        raise CheckpointError(
            f"{where} {brief(value)} of a weight [{n}, {k}] is not supported: blocks are columns "
            "of one row, whole rows or the whole weight"
        )
    return sizes[1]


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    scheme, about = layer.scheme, layer.details
    key = f"{name}._weight_qdata"
    n, k = store.shape(key)
    shape = (1, 1) if scheme.per_tensor else (n, scheme.groups(k))
    scales = _parameter(store, f"{name}._weight_scale", shape, (scheme.scale_dtype,))
    zeros = None
    if not about.bits:
        codes = store.take(key, (n, k), (torch.float8_e4m3fn,)).view(torch.uint8)
    else:
        stored = store.take(key, (n, k), (torch.int8,))
        codes = _unsigned(stored, about.bits, scheme, f"{store.folder}: {key}")
    key = f"{name}._weight_zero_point"
    if key in layer.tensors:
        stored = _parameter(store, key, shape, (torch.int8, *_FLOATS))
        if about.zeros:
            zeros = _unsigned(stored, about.bits, scheme, f"{store.folder}: {key}")
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales,
        zeros=zeros,
        bias=store.take_if_there(f"{name}.bias", (n,)),
    )


def _parameter(
    store: Store, key: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """Scales or zero points; one for the whole weight may have any number of dimensions."""
    if shape == (1, 1) and all(size == 1 for size in store.shape(key)):
        return store.take(key, store.shape(key), dtypes).reshape(1, 1)
    return store.take(key, shape, dtypes)


def _unsigned(values: Tensor, bits: int, scheme: QuantScheme, where: str) -> Tensor:
    """Signed integers of `bits` bits as codes of the scheme, which may have more."""
    half = 1 << (bits - 1)
    whole = not values.is_floating_point() or torch.equal(values, values.round())
    if not whole or not -half <= float(values.min()) <= float(values.max()) < half:
        raise CheckpointError(f"{where} holds what is no integer of {bits} bits")
    return (values.short() + (1 << (scheme.bits - 1))).to(torch.uint8)


TORCHAO = Format(
    name=NAME,
    title="of torchao: integers of 1 to 8 bits in int8, float8",
    why_not=only_read,
    detect=says_method(NAME),
    read_plan=_read_plan,
    read_layer=_read_layer,
)
