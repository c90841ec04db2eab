"""The compressed-tensors format, which Transformers and vLLM read.

pack-quantized   weight_packed int32 [N, ceil(K*b/32)]   the plain layout's words
                 weight_scale [N, G], weight_zero_point int32 [ceil(N*b/32), G] packed along N,
                 weight_shape int64 [2]
int-quantized    weight int8 [N, K] = code - 2^(b-1), weight_scale, weight_zero_point int8
float-quantized  weight float8 [N, K], weight_scale

weight_scale is [N, 1] per channel and [1] per tensor; a zero point per tensor is never packed, but
int8 [1] = zero - 2^(b-1). input_scale [1] goes with static activations. Weights without activation
quantization are packed, others are not.

Scales are never negative, since they come from max |w| or max w - min w. They may be zero: some
writers keep them from that by a smallest scale and some do not, and one of fp16 may be too small
for its type. All weights of such a group are zero.
Source: the compressed-tensors package (Neural Magic, Apache-2.0), read as documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import dense_words, pack_dense, unpack_dense
from qkernels.checkpoints.compressed_tensors_config import (
    FLOAT,
    NAME,
    PACKED,
    kind_of,
    read_section,
    write_section,
)
from qkernels.checkpoints.config import Config, quantization_of
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind, says_method
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import SMALLEST_GROUP, QuantScheme
from qkernels.weight import QuantizedWeight

_FIELDS = frozenset(("scales", "zeros", "activation_scale"))
"""The hub fields that the format has tensors for."""

_SIGNS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
"""Tensors that none but a quantized layer has."""

_PARTS = (*_SIGNS, "weight", "input_scale", "input_zero_point", "bias")
"""Every tensor that a quantized layer may have."""


def _why_not(kind: WeightKind) -> str | None:
    scheme = kind.scheme
    if kind.instead_of is not None:
        return f"is read into nn.Linear alone, and this takes the place of {kind.instead_of}"
    if scheme.weight.kind == "codebook":
        return f"has no {scheme.weight.name} codebooks"
    if scheme.weight.name == "fp8e5m2":
        return "has no float8 E5M2 weights"
    if scheme.scale_levels != "one":
        return "has no scales of several levels (-flat has one)"
    beyond = sorted(kind.fields - _FIELDS)
    if beyond:
        return f"has no tensor for {', '.join(beyond)}"
    if kind.real_zeros:
        return "has no zero points that are no integers"
    if kind.negative_scales:
        return "has no negative scales"
    if kind.shape is not None and scheme.group_size is not None:
        k, size = kind.shape[1], scheme.group_size
        if k > size and k % size:
            return f"reads no groups of {size} where K is {k}: use a group size that divides K"
    return None


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = read_section(quantization_of(config) or {})
    names = dict.fromkeys(key.rpartition(".")[0] for key in store if _part(key) in _SIGNS)
    layers = {}
    for name in names:
        group = section.group_of(name)
        scale = store.dtype(f"{name}.weight_scale")
        try:
            scheme = replace(group.scheme, scale_dtype=scale)
        except SchemeError as error:
            raise CheckpointError(f"{name}.weight_scale: {error}") from None
        parts = tuple(f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, parts, group.kind)
    return layers


def _part(key: str) -> str:
    return key.rpartition(".")[2]


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    scheme, kind = layer.scheme, layer.details
    given = {_part(key) for key in layer.tensors}
    codes = _read_codes(store, name, scheme, kind)
    n, k = codes.shape
    _check_columns(store, name, scheme, k)
    shape = (1,) if scheme.per_tensor else (n, scheme.groups(k))
    scales = _one_or(store, f"{name}.weight_scale", shape, (scheme.scale_dtype,))
    if (scales < 0).any():
        raise CheckpointError(f"{name}.weight_scale is negative, which the format has no use for")
    zeros = None
    if not scheme.symmetric:
        zeros = _read_zeros(store, name, scheme, kind, n, shape)
    elif "weight_zero_point" in given:
        _check_zero(store, f"{name}.weight_zero_point", "symmetric weights")
    if "input_zero_point" in given:
        _check_zero(store, f"{name}.input_zero_point", "symmetric input activations")
    static = scheme.activation.granularity == "static"
    if "input_scale" in given and not static:
        raise CheckpointError(f"{name} has an input_scale, and its config no static activations")
    input_scale = _one_or(store, f"{name}.input_scale", (1,)) if static else None
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales.reshape(-1, 1) if scheme.per_tensor else scales,
        zeros=zeros,
        activation_scale=None if input_scale is None else input_scale.float().reshape(()),
        bias=store.take(f"{name}.bias", (n,)) if "bias" in given else None,
    )


def _read_codes(store: Store, name: str, scheme: QuantScheme, kind: str) -> Tensor:
    if kind == PACKED:
        sizes = store.take(f"{name}.weight_shape", (2,), (torch.int64, torch.int32))
        n, k = (int(size) for size in sizes)
        shape = (n, dense_words(k, scheme.bits))
        words = store.take(f"{name}.weight_packed", shape, (torch.int32,))
        return unpack_dense(words, k, scheme.bits)
    if kind == FLOAT:
        assert scheme.weight.float_dtype is not None
        stored = store.take(f"{name}.weight", (None, None), (scheme.weight.float_dtype,))
        return stored.view(torch.uint8)
    return _unsigned(store.take(f"{name}.weight", (None, None), (torch.int8,)), scheme.bits)


def _read_zeros(
    store: Store, name: str, scheme: QuantScheme, kind: str, n: int, shape: tuple[int, ...]
) -> Tensor:
    key = f"{name}.weight_zero_point"
    # Per tensor, qkernels 0.1.0 wrote it packed.
    packed = store.dtype(key) == torch.int32 if scheme.per_tensor else kind == PACKED
    if not packed:
        zeros = _unsigned(_one_or(store, key, shape, (torch.int8,)), scheme.bits)
        return zeros.reshape(-1, 1) if scheme.per_tensor else zeros
    rows, groups = (1, 1) if scheme.per_tensor else (n, shape[1])
    words = store.take(key, (dense_words(rows, scheme.bits), groups), (torch.int32,))
    return unpack_dense(words.t().contiguous(), rows, scheme.bits).t().contiguous()


def _one_or(
    store: Store, key: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype] = ()
) -> Tensor:
    """A tensor of `shape`, where a single number may have any number of dimensions."""
    if shape == (1,) and all(size == 1 for size in store.shape(key)):
        return store.take(key, store.shape(key), dtypes).reshape(1)
    return store.take(key, shape, dtypes)


def _check_zero(store: Store, key: str, where: str) -> None:
    if store.get(key).any():
        raise CheckpointError(f"{key} is not zero, and the config says {where}")


def _check_columns(store: Store, name: str, scheme: QuantScheme, k: int) -> None:
    """Columns must be in the order of the weight."""
    key = f"{name}.weight_g_idx"
    if key not in store:
        return
    index = store.take(key, (k,), (torch.int32, torch.int64))
    in_order = torch.arange(k) // scheme.group_length(k)
    # -1 is what the package wrote for no index at all.
    if not (index == -1).all() and not torch.equal(index.long(), in_order):
        raise CheckpointError(f"{key}: columns in the order of activations are not supported here")


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """Signed values int8 -> unsigned codes; values beyond `bits` bits become codes beyond them."""
    return values.view(torch.uint8) + (1 << (bits - 1))


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - (1 << (bits - 1))).view(torch.int8)


def _write_layer(weight: QuantizedWeight) -> dict[str, Tensor]:
    scheme, kind = weight.scheme, kind_of(weight.scheme)
    scales = weight.scales.flatten() if scheme.per_tensor else weight.scales
    tensors = {"weight_scale": scales.contiguous()}
    if kind == PACKED:
        tensors["weight_packed"] = pack_dense(weight.codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    elif kind == FLOAT:
        assert scheme.weight.float_dtype is not None
        tensors["weight"] = weight.codes.view(scheme.weight.float_dtype)
    else:
        tensors["weight"] = _signed(weight.codes, scheme.bits)
    if weight.zeros is not None:
        if scheme.per_tensor or kind != PACKED:
            zeros = _signed(weight.zeros, scheme.bits)
            tensors["weight_zero_point"] = zeros.flatten() if scheme.per_tensor else zeros
        else:
            words = pack_dense(weight.zeros.t().contiguous(), scheme.bits)
            tensors["weight_zero_point"] = words.t().contiguous()
    if weight.activation_scale is not None:
        tensors["input_scale"] = weight.activation_scale.reshape(1)
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def _write_config(layers: Mapping[str, WeightKind], dense: Sequence[str]) -> dict[str, Any]:
    return write_section({name: _scheme_as_read(kind) for name, kind in layers.items()}, dense)


def _scheme_as_read(kind: WeightKind) -> QuantScheme:
    """The scheme with the same numbers that the format's readers take.

    They refuse groups that are larger than K, of which a row has one.
    """
    scheme = kind.scheme
    if kind.shape is None or scheme.group_size is None or scheme.group_size <= kind.shape[1]:
        return scheme
    k = kind.shape[1]
    return replace(scheme, group_size=k if k >= SMALLEST_GROUP else None)


COMPRESSED_TENSORS = Format(
    name=NAME,
    title="of llm-compressor; read by Transformers and vLLM",
    why_not=_why_not,
    detect=says_method(NAME),
    read_plan=_read_plan,
    read_layer=_read_layer,
    write_layer=_write_layer,
    write_config=_write_config,
    # Scales of a KV cache in 8 bits, by their names and by those they had at first.
    unused=(r"\.[kvq]_(scale|zero_point)$", r"\.[kv]_proj\.output_(scale|zero_point)$"),
)
