"""The compressed-tensors format, which Transformers and vLLM read.

pack-quantized   weight_packed int32 [N, ceil(K*b/32)]   the plain layout's words
                 weight_scale [N, G], weight_zero_point int32 [ceil(N*b/32), G] packed along N,
                 weight_shape int64 [2]
int-quantized    weight int8 [N, K] = code - 2^(b-1), weight_scale, weight_zero_point int8
float-quantized  weight float8 [N, K], weight_scale
nvfp4-pack-quantized  weight_packed uint8 [N, K/2] of E2M1 numbers, the even column in the low bits,
                 weight_scale float8 [N, K/16], weight_global_scale fp32 [1]: scale / global scale
mxfp4-pack-quantized  the same with weight_scale uint8 [N, K/32]: 2^(e - 127)
mxfp8-quantized  weight float8 [N, K], weight_scale uint8 [N, K/32]

weight_scale is [N, 1] per channel, [1] per tensor and [N/r, K/c] for blocks; a zero point per
tensor is never packed, but int8 [1] = zero - 2^(b-1). input_scale [1] goes with static activations,
and input_zero_point int8 [1] with those that are not symmetric.
Weights without activation quantization are packed, others are not. With weight_g_idx int32 [K],
column k is of group weight_g_idx[k].

Codes of 3, 5, 6 and 7 bits are one stream of bits since version 0.18 of the package; before, they
straddled no words. Mostly the width of weight_packed tells which. Integers of 1, 5, 6 and 7 bits
are held in the next wider weight type.

Scales may be zero: some writers keep them from that by a smallest scale and some do not, and one of
fp16 may be too small for its type. All weights of such a group are zero. They may be negative too,
as AutoRound writes them where that rounds better.
Source: the compressed-tensors package (Neural Magic, Apache-2.0), read as documentation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import dense_words, pack_dense, unpack_dense
from qkernels.checkpoints.compressed_tensors_config import (
    FLOAT,
    INTEGER,
    MXFP4,
    MXFP8,
    NAME,
    NVFP4,
    PACKED,
    Group,
    kind_of,
    read_section,
    write_section,
)
from qkernels.checkpoints.config import Config, quantization_of
from qkernels.checkpoints.exact import with_integer_zeros
from qkernels.checkpoints.format import REAL_ZEROS, Format, StoredLayer, WeightKind, says_method
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

_FIELDS = frozenset(("scales", "zeros", "activation_scale", "activation_zero"))
"""The hub fields that the format has tensors for."""

_SIGNS = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    "weight_global_scale",
)
"""Tensors that none but a quantized layer has."""

_PARTS = (*_SIGNS, "weight", "input_scale", "input_zero_point", "input_global_scale", "bias")
"""Every tensor that a quantized layer may have."""

_EXPONENTS = (MXFP4, MXFP8)
"""Formats whose scales are powers of two, stored as their exponents."""


def _why_not(kind: WeightKind) -> str | None:
    scheme = kind.scheme
    if kind.instead_of is not None:
        return f"is read into nn.Linear alone, and this takes the place of {kind.instead_of}"
    if scheme.weight.name == "fp4":
        return "is not written with fp4 weights, whose scales it has in two levels or as exponents"
    if scheme.weight.kind == "codebook":
        return f"has no {scheme.weight.name} codebooks"
    if scheme.weight.name == "fp8e5m2":
        return "has no float8 E5M2 weights"
    if scheme.scale_levels != "one":
        return "has no scales of several levels (-flat has one)"
    if scheme.activation.outliers:
        return "keeps no columns of activations in 16 bits"
    if scheme.activation.by_position:
        return "has no scales of activations per position"
    if scheme.activation.dtype == "int4":
        return "rounds 4-bit activations to -8..7 with scales of max|x| / 7.5, not to -7..7"
    beyond = sorted(kind.fields - _FIELDS)
    if beyond:
        return f"has no tensor for {', '.join(beyond)}"
    if kind.real_zeros:
        return REAL_ZEROS
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
            scheme = replace(group.scheme, scale_dtype=_held_scale(group.kind, scale))
        except SchemeError as error:
            raise CheckpointError(f"{name}.weight_scale: {error}") from None
        parts = tuple(f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, parts, group)
    return layers


def _held_scale(kind: str, stored: torch.dtype) -> torch.dtype:
    """The type of the scales of a weight, whose stored scales are of type `stored`."""
    return torch.float32 if kind == NVFP4 or kind in _EXPONENTS else stored


def _part(key: str) -> str:
    return key.rpartition(".")[2]


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    scheme, group = layer.scheme, layer.details
    given = {_part(key) for key in layer.tensors}
    codes, dense = _read_codes(store, name, scheme, group)
    n, k = codes.shape
    perm = _read_columns(store, name, scheme, group, k)
    scales = _read_scales(store, name, scheme, group, n, k)
    zeros = None
    if not scheme.symmetric:
        zeros = _read_zeros(store, name, scheme, group, dense, n, scheme.groups(k))
    elif "weight_zero_point" in given:
        _check_zero(store, f"{name}.weight_zero_point", "symmetric weights")
    activation = scheme.activation
    if "input_zero_point" in given and not activation.has_zeros:
        _check_zero(store, f"{name}.input_zero_point", "symmetric input activations")
    if "input_scale" in given and not activation.is_static:
        raise CheckpointError(f"{name} has an input_scale, and its config no static activations")
    input_scale = input_zero = None
    if activation.is_static:
        input_scale = _one_or(store, f"{name}.input_scale", (1,)).float().reshape(())
    if activation.is_static and activation.has_zeros:
        stored = _one_or(store, f"{name}.input_zero_point", (1,), (torch.int8,))
        input_zero = stored.int().reshape(())
    return QuantizedWeight(
        scheme=scheme,
        codes=codes if perm is None else codes[:, perm],
        scales=scales.reshape(-1, 1) if scheme.per_tensor else scales,
        zeros=zeros,
        perm=perm,
        activation_scale=input_scale,
        activation_zero=input_zero,
        bias=store.take(f"{name}.bias", (n,)) if "bias" in given else None,
    )


def _read_codes(store: Store, name: str, scheme: QuantScheme, group: Group) -> tuple[Tensor, bool]:
    """The codes, uint8 [N, K], and whether packed ones are one stream of bits."""
    if group.kind == PACKED:
        return _read_packed(store, name, scheme, group)
    if group.kind in (NVFP4, MXFP4):
        packed = store.take(f"{name}.weight_packed", (None, None), (torch.uint8,))
        return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1), True
    if scheme.weight.float_dtype is not None:
        stored = store.take(f"{name}.weight", (None, None), (scheme.weight.float_dtype,))
        return stored.view(torch.uint8), True
    assert group.kind == INTEGER, group.kind
    codes = _unsigned(store.take(f"{name}.weight", (None, None), (torch.int8,)), group.bits)
    _check_bits(codes, group.bits, f"{store.folder}: {name}: codes of scheme {scheme}")
    return _widened(codes, group.bits, scheme), True


def _check_bits(codes: Tensor, bits: int, where: str) -> None:
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise CheckpointError(f"{where} must be below {1 << bits}, got {int(codes.max())}")


def _widened(codes: Tensor, bits: int, scheme: QuantScheme) -> Tensor:
    """Codes or zero points of `bits` bits as the same integers in those of the scheme."""
    return codes + (1 << (scheme.bits - 1)) - (1 << (bits - 1)) if bits != scheme.bits else codes


def _read_packed(store: Store, name: str, scheme: QuantScheme, group: Group) -> tuple[Tensor, bool]:
    sizes = store.take(f"{name}.weight_shape", (2,), (torch.int64, torch.int32))
    n, k = (int(size) for size in sizes)
    bits, stored = group.bits, store.shape(f"{name}.weight_packed")
    widths = {True: dense_words(k, bits), False: -(-k // (32 // bits))}
    fitting = [dense for dense, width in widths.items() if stored == (n, width)]
    # Since 0.18 values are a stream of bits, that may lie in two words.
    dense = fitting[0] if len(fitting) == 1 else not _before(group.version, 18)
    words = store.take(f"{name}.weight_packed", (n, widths[dense]), (torch.int32,))
    return _widened(_unpacked(words, k, bits, dense), bits, scheme), dense


def _before(version: str | None, minor: int) -> bool:
    """Whether `version` is one of before 0.<minor>."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version or "")
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, minor)


def _unpacked(words: Tensor, count: int, bits: int, dense: bool) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, count]."""
    if dense:
        return unpack_dense(words, count, bits)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (words[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(1)[:, :count].contiguous()


def _read_scales(
    store: Store, name: str, scheme: QuantScheme, group: Group, n: int, k: int
) -> Tensor:
    """[N, G], or [1] per tensor, of the scheme's type."""
    key, groups = f"{name}.weight_scale", scheme.groups(k)
    if scheme.per_tensor:
        return _one_or(store, key, (1,), (scheme.scale_dtype,))
    if group.kind in _EXPONENTS:
        exponents = store.take(key, (n, groups), (torch.uint8,))
        if (exponents == 255).any():
            raise CheckpointError(f"{store.folder}: {key} holds 255, which stands for NaN")
        return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
    if group.kind == NVFP4:
        scales = store.take(key, (n, groups), (torch.float8_e4m3fn,)).float()
        key = f"{name}.weight_global_scale"
        return scales / _one_or(store, key, (1,), (torch.float32,))
    if group.block_rows > 1:
        rows = -(-n // group.block_rows)
        scales = store.take(key, (rows, groups), (scheme.scale_dtype,))
        return scales[torch.arange(n) // group.block_rows]
    return store.take(key, (n, groups), (scheme.scale_dtype,))


def _read_zeros(
    store: Store,
    name: str,
    scheme: QuantScheme,
    group: Group,
    dense: bool,
    n: int,
    groups: int,
) -> Tensor:
    """uint8 [N, G], or [1, 1] per tensor."""
    key, bits = f"{name}.weight_zero_point", group.bits
    shape = (1,) if scheme.per_tensor else (n, groups)
    # Per tensor, qkernels 0.1.0 wrote it packed.
    packed = store.dtype(key) == torch.int32 if scheme.per_tensor else group.kind == PACKED
    if not packed:
        zeros = _unsigned(_one_or(store, key, shape, (torch.int8,)), bits)
        _check_bits(zeros, bits, f"{store.folder}: {key}, plus {1 << (bits - 1)},")
        return _widened(zeros.reshape(-1, 1) if scheme.per_tensor else zeros, bits, scheme)
    rows = 1 if scheme.per_tensor else n
    width = dense_words(rows, bits) if dense else -(-rows // (32 // bits))
    words = store.take(key, (width, groups), (torch.int32,)).t().contiguous()
    return _widened(_unpacked(words, rows, bits, dense).t().contiguous(), bits, scheme)


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


def _read_columns(
    store: Store, name: str, scheme: QuantScheme, group: Group, k: int
) -> Tensor | None:
    """The order of columns in which groups follow each other, or None where that is their own."""
    key = f"{name}.weight_g_idx"
    # Until 0.19 the package stored one wherever groups are by activations.
    if key not in store and not (group.ordered and _before(group.version, 19)):
        return None
    index = store.take(key, (k,), (torch.int32, torch.int64)).long()
    in_order = torch.arange(k) // scheme.group_length(k)
    # -1 is what the package wrote for no index at all.
    if (index == -1).all() or torch.equal(index, in_order):
        return None
    ordered, perm = index.sort(stable=True)
    if not torch.equal(ordered, in_order):
        raise CheckpointError(
            f"{store.folder}: {key} must name each group of 0..{scheme.groups(k) - 1} for "
            f"{scheme.group_length(k)} columns, got {int(ordered[0])}..{int(ordered[-1])}"
        )
    return perm


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """Signed values int8 -> unsigned codes; values beyond `bits` bits become codes beyond them."""
    return values.view(torch.uint8) + (1 << (bits - 1))


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - (1 << (bits - 1))).view(torch.int8)


def _write_layer(weight: QuantizedWeight) -> dict[str, Tensor]:
    weight = with_integer_zeros(weight)
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
    if weight.activation_zero is not None:
        tensors["input_zero_point"] = weight.activation_zero.to(torch.int8).reshape(1)
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
    return replace(scheme, group_size=kind.shape[1])


COMPRESSED_TENSORS = Format(
    name=NAME,
    title="of llm-compressor; read by Transformers and vLLM",
    why_not=_why_not,
    detect=says_method(NAME),
    read_plan=_read_plan,
    read_layer=_read_layer,
    write_layer=_write_layer,
    write_config=_write_config,
    keeps_kv_cache=True,
)
