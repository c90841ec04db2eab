"""The format of torchao: tensor subclasses, flattened into safetensors files.

The files' own metadata says of each tensor <layer>.weight what class it is, as JSON: "_type",
"_data" with its attributes, and "_tensor_data_names" of the parts in which it is stored. The
classes are rows of `torchao_integers.py` and `torchao_floats.py`.

Weights dequantize to torchao's own numbers in fp32, bit for bit where the package computes in fp32
itself; Int4Tensor and the packed int4 classes have no dequantization of their own but in kernels,
and are what these add up: the product and the zero point, rounded once.
Source: the torchao package (Meta, BSD-3-Clause), read as documentation.
"""

from __future__ import annotations

import json
from typing import Any

from qkernels.checkpoints.config import Config, only, quantization_of, shortened, strings, typed
from qkernels.checkpoints.format import Format, StoredLayer, only_read, says_method
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.torchao_floats import FLOAT_CLASSES
from qkernels.checkpoints.torchao_integers import INTEGERS
from qkernels.checkpoints.torchao_parts import Parts
from qkernels.errors import CheckpointError, SchemeError
from qkernels.weight import QuantizedWeight

NAME = "torchao"

_KEYS = frozenset(
    (
        *("quant_method", "quant_type", "modules_to_not_convert"),
        # Which layers are quantized, which the tensors say.
        *("include_input_output_embeddings", "untie_embedding_weights"),
    )
)
_CLASSES = INTEGERS | FLOAT_CLASSES

_INT4 = ("Int4Tensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor")
_CLASSES_OF_CONFIG: dict[str, tuple[str, ...]] = {
    "Int4WeightOnlyConfig": _INT4,
    "Float8DynamicActivationInt4WeightConfig": _INT4,
    "Int8WeightOnlyConfig": ("Int8Tensor",),
    "Int8DynamicActivationInt8WeightConfig": ("Int8Tensor",),
    "Int8StaticActivationInt8WeightConfig": ("Int8Tensor",),
    "IntxWeightOnlyConfig": ("IntxUnpackedToInt8Tensor",),
    "Int8DynamicActivationIntxWeightConfig": ("IntxUnpackedToInt8Tensor",),
    "Float8WeightOnlyConfig": ("Float8Tensor",),
    "Float8DynamicActivationFloat8WeightConfig": ("Float8Tensor",),
    "MXDynamicActivationMXWeightConfig": ("MXTensor",),
    "NVFP4DynamicActivationNVFP4WeightConfig": ("NVFP4Tensor",),
    "NVFP4WeightOnlyConfig": ("NVFP4Tensor",),
}
"""The classes that each of torchao's configs makes; of others, the tensors alone say it."""


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
    wanted = _CLASSES_OF_CONFIG.get(said) if isinstance(said, str) else None
    if wanted is not None and kind not in wanted:
        raise CheckpointError(f"quantization_config says {said}, and {name}.weight is of {kind}")


def _plan_layer(
    store: Store, name: str, kind: str, about: dict[str, Any], where: str
) -> StoredLayer:
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{where}: the class {shortened(kind, 60)} is not supported; supported are "
            f"{', '.join(_CLASSES)}"
        )
    row, data = _CLASSES[kind], typed(about.get("_data"), dict, f"{where}: _data")
    only(data, row.attributes, where)
    named = strings(about.get("_tensor_data_names"), f"{where}: _tensor_data_names")
    beyond = sorted(set(named) - row.parts)
    if beyond:
        raise CheckpointError(f"{where}: {beyond[0]} of a {kind} is not supported")
    parts = Parts(store, name, kind, data, frozenset(named), where)
    try:
        scheme = row.scheme(parts)
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from None
    keys = (*(parts.key(part) for part in sorted(parts.names)), f"{name}.bias")
    return StoredLayer(scheme, tuple(key for key in keys if key in store), parts)


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    parts: Parts = layer.details
    fields = dict(_CLASSES[parts.kind].read(parts, layer.scheme))
    codes = fields.pop("codes")
    assert codes is not None
    bias = store.take_if_there(f"{name}.bias", (codes.shape[0],))
    return QuantizedWeight(scheme=layer.scheme, codes=codes, bias=bias, **fields)


TORCHAO = Format(
    name=NAME,
    title="of torchao: integers of 1 to 8 bits, float8, MXFP4, MXFP8 and NVFP4",
    why_not=only_read,
    detect=says_method(NAME),
    read_plan=_read_plan,
    read_layer=_read_layer,
)
