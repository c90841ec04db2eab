"""qkernels' own format: every scheme and every hub field, as the buffers of the plain layout.

<layer>.words, then <layer>.<field> for each field that the weight has, and <layer>.bias: what
`WQLinear.state_dict` holds. config.json has, for layers alike:

    "quantization_config": {"quant_method": "qkernels", "version": 1, "groups": [
        {"scheme": "w4a16-g128", "shape": [N, K], "layers": [name, ...], "fields": [...]}, ...],
        "shared": {name of an embedding: name of the layer whose weight it has, ...}}

"fields" names those that the layers have and their scheme does not ask for, where there are any. An
embedding with a weight of its own is a layer too. "shared" stands where there are any.

Scales may be any finite numbers, as in the hub: where all weights are zero, other packages write
zeros (bitsandbytes, GGUF), and some types of GGUF have negative scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import dense_words
from qkernels.checkpoints import kv_cache
from qkernels.checkpoints.config import Config, brief, only, quantization_of, strings, typed
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind, says_method
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.fields import FIELDS, optional_fields
from qkernels.layouts import PLAIN, PackedWeight, pack
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

VERSION = 1
"""Raised by a change that this reader would read wrongly."""

_KEYS = frozenset(("quant_method", "version", "groups", "shared", kv_cache.KEY))
_GROUP_KEYS = frozenset(("scheme", "shape", "layers", "fields"))


def _why_not(kind: WeightKind) -> None:
    return None


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = quantization_of(config) or {}
    version = section.get("version")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"{store.folder} is in version {brief(version)} of the qkernels format, and this "
            f"qkernels reads version {VERSION}: update it"
        )
    only(section, _KEYS, "quantization_config")
    layers: dict[str, StoredLayer] = {}
    for i, entry in enumerate(typed(section.get("groups"), list, "groups")):
        where = f"groups[{i}]"
        group = typed(entry, dict, where)
        only(group, _GROUP_KEYS, where)
        try:
            scheme = QuantScheme.parse(typed(group.get("scheme"), str, f"{where}.scheme"))
        except SchemeError as error:
            raise CheckpointError(f"{where}: {error}") from None
        sizes = typed(group.get("shape"), list, f"{where}.shape")
        if len(sizes) != 2:
            raise CheckpointError(f"{where}.shape must be [N, K], got {sizes}")
        n, k = (typed(size, int, f"{where}.shape") for size in sizes)
        for name in strings(group.get("layers"), f"{where}.layers"):
            if name in layers:
                raise CheckpointError(f"{where} names the layer {name} a second time")
            parts = ("words", *FIELDS, "bias")
            found = tuple(part for part in parts if f"{name}.{part}" in store)
            if "fields" in group:
                named = set(strings(group["fields"], f"{where}.fields"))
                _check_fields(store, name, named, set(optional_fields(scheme, found)))
            layers[name] = StoredLayer(scheme, tuple(f"{name}.{part}" for part in found), (n, k))
    for name, said in typed(section.get("shared", {}), dict, "shared").items():
        source = typed(said, str, f"shared[{brief(name)}]")
        if name in layers or source not in layers or layers[source].shares is not None:
            raise CheckpointError(
                f"shared says that {name} has the weight of {brief(source)}, which must be a layer "
                "of groups, and the other none"
            )
        stored = layers[source]
        layers[name] = StoredLayer(stored.scheme, (), stored.details, shares=source)
    return layers


def _check_fields(store: Store, name: str, said: set[str], found: set[str]) -> None:
    """Raises where a layer has other optional fields than the config says."""
    if said != found:
        field = sorted(said ^ found)[0]
        there = "is missing" if field in said else "is there, and the config does not say so"
        raise CheckpointError(
            f"{store.folder}: {name}.{field} {there}: copy or save the whole model anew"
        )


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    scheme, (n, k) = layer.scheme, layer.details
    words = store.take(f"{name}.words", (n, dense_words(k, scheme.bits)), (torch.int32,))
    buffers = {"words": words}
    for field in FIELDS:
        if f"{name}.{field}" in layer.tensors:
            buffers[field] = store.get(f"{name}.{field}")
    bias = store.get(f"{name}.bias") if f"{name}.bias" in layer.tensors else None
    return PackedWeight(scheme, PLAIN, n, k, buffers).unpack(bias)


def _write_layer(weight: QuantizedWeight) -> dict[str, Tensor]:
    tensors = dict(pack(weight, PLAIN).buffers)
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def _write_config(layers: Mapping[str, WeightKind], dense: Sequence[str]) -> dict[str, Any]:
    alike: dict[tuple[Any, ...], list[str]] = {}
    shared = {n: kind.shares for n, kind in layers.items() if kind.shares is not None}
    for name in (name for name in layers if name not in shared):
        kind = layers[name]
        fields = tuple(sorted(optional_fields(kind.scheme, kind.fields)))
        alike.setdefault((kind.scheme, kind.shape, fields), []).append(name)
    groups = [
        # Versions that do not know of fields read layers that have none beyond their scheme's.
        {"scheme": str(scheme), "shape": shape, "layers": names}
        | ({"fields": list(fields)} if fields else {})
        for (scheme, shape, fields), names in alike.items()
    ]
    section = {"quant_method": NATIVE.name, "version": VERSION, "groups": groups}
    return {**section, "shared": shared} if shared else section


NATIVE = Format(
    name="qkernels",
    title="our own, for every scheme; read by qkernels alone",
    why_not=_why_not,
    detect=says_method("qkernels"),
    read_plan=_read_plan,
    read_layer=_read_layer,
    write_layer=_write_layer,
    write_config=_write_config,
    head_beside_tie=True,
    embeddings=True,
    takes_stacks=True,
    keeps_kv_cache=True,
)
