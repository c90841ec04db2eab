"""Tensor classes of torchao that hold integers.

Int8Tensor                _weight_qdata int8 [N, K], _weight_scale and _weight_zero_point
IntxUnpackedToInt8Tensor  the same of 1 to 8 bits in int8, of which target_dtype says how many
Int4Tensor                _weight_qdata int8 [N, K/2], two signed nibbles a byte, the even column in
                          the low bits; _weight_scale and _weight_zero_point [K/g, N]
Int4TilePackedTo4dTensor  _weight_qdata int32 [N/8, K/128, 32, 4] in tinygemm's order, filled up to
                          whole tiles; _weight_scale_and_zero bf16 [K/g, N, 2]
Int4PlainInt32Tensor      _weight_qdata int32 [N, K/8], nibbles in the order of columns;
                          _weight_scale [K/g, N] and _weight_zero_point int8 [K/g, N]

Scales and zero points of the first two are [N / rows, K / columns], with block_size = [rows,
columns]. w = (q - zero_point) * scale, but in Int4Tensor and Int4TilePackedTo4dTensor, where the
zero point is in units of the weight: w = q * scale + zero_point with signed q, in the latter q - 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import unpack_dense, unpack_tinygemm
from qkernels.bits.tinygemm import TILE_COLUMNS, TILE_ROWS
from qkernels.checkpoints.config import brief
from qkernels.checkpoints.torchao_parts import (
    FLOATS,
    Parts,
    TensorClass,
    group_size,
    quantized_inputs,
    stated_shape,
    type_and_data,
)
from qkernels.errors import CheckpointError
from qkernels.scheme import WEIGHT_TYPES, Activation, QuantScheme

_Fields = Mapping[str, Tensor | None]
_HELD_BITS = {bits: next(held for held in (2, 3, 4, 8) if held >= bits) for bits in range(1, 9)}
"""Bits of the weight type that holds integers of so many bits."""


def _bits(parts: Parts) -> int:
    """Of the stored integers."""
    if parts.kind == "Int8Tensor":
        return 8
    where = f"{parts.where}: target_dtype"
    _, name = type_and_data(parts.data.get("target_dtype"), where)
    known = {f"int{bits}": bits for bits in _HELD_BITS}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{where} {brief(name)} is not one of int1 to int8")
    return known[name]


def _activation(parts: Parts) -> Activation:
    if parts.kind == "Int8Tensor":
        return quantized_inputs(parts, "QuantizeTensorToInt8Kwargs", "int8")
    said = parts.data.get("activation_quantization")
    name = said.get("_data") if isinstance(said, dict) else said
    if name is None:
        return Activation()
    if str(name).lower() != "int8_asym_per_token":
        raise CheckpointError(
            f"{parts.where}: inputs quantized as {brief(name)} are not supported: "
            "int8_asym_per_token is"
        )
    return Activation("int8", "tokenasym")


def _unpacked_scheme(parts: Parts) -> QuantScheme:
    shape = parts.shape("qdata", 2)
    group, scales = group_size(parts, shape), parts.key("scale")
    return QuantScheme(
        WEIGHT_TYPES[f"int{_HELD_BITS[_bits(parts)]}"],
        group_size=group,
        per_tensor=group is None and parts.store.shape(scales) != (shape[0], 1),
        symmetric=not parts.any("zero_point"),
        activation=_activation(parts),
        scale_dtype=parts.store.dtype(scales),
    )


def _read_unpacked(parts: Parts, scheme: QuantScheme) -> _Fields:
    n, k = parts.shape("qdata", 2)
    shape, bits = (1, 1) if scheme.per_tensor else (n, scheme.groups(k)), _bits(parts)
    codes = parts.take("qdata", (n, k), (torch.int8,))
    fields: dict[str, Tensor | None] = {
        "codes": _unsigned(codes, bits, scheme, parts, "qdata"),
        "scales": parts.parameter("scale", shape, (scheme.scale_dtype,)),
        "input_factor": parts.input_factor(k),
    }
    if "zero_point" in parts.names:
        zeros = parts.parameter("zero_point", shape, (torch.int8, *FLOATS))
        if not scheme.symmetric:
            fields["zeros"] = _zeros(zeros, bits, scheme, parts)
    if scheme.activation.is_static:
        fields["activation_scale"] = parts.one("act_quant_scale", FLOATS).float()
    elif "act_quant_scale" in parts.names:
        raise CheckpointError(
            f"{parts.where}: {parts.key('act_quant_scale')} is stored, and act_quant_kwargs says "
            "nothing of inputs that are quantized"
        )
    if scheme.activation.granularity == "staticasym":
        zero = parts.one("act_quant_zero_point", (torch.int8, torch.int32, torch.int64, *FLOATS))
        if zero.float() != zero.float().round():
            raise CheckpointError(
                f"{parts.store.folder}: {parts.key('act_quant_zero_point')} is {float(zero)}, no "
                "integer"
            )
        fields["activation_zero"] = zero.int()
    elif parts.any("act_quant_zero_point"):
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('act_quant_zero_point')} is not zero, and "
            "act_quant_kwargs says symmetric"
        )
    return fields


def _unsigned(values: Tensor, bits: int, scheme: QuantScheme, parts: Parts, part: str) -> Tensor:
    """Signed integers of `bits` bits as codes of the scheme, which may have more."""
    half = 1 << (bits - 1)
    whole = not values.is_floating_point() or torch.equal(values, values.round())
    inside = not values.numel() or -half <= float(values.min()) <= float(values.max()) < half
    if not whole or not inside:
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key(part)} holds what is no integer of {bits} bits"
        )
    return (values.short() + (1 << (scheme.bits - 1))).to(torch.uint8)


def _zeros(values: Tensor, bits: int, scheme: QuantScheme, parts: Parts) -> Tensor:
    """Zero points in units of codes: uint8, or fp32 where they are no integers."""
    if not values.is_floating_point() or torch.equal(values, values.round()):
        return _unsigned(values, bits, scheme, parts, "zero_point")
    if not values.isfinite().all():
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('zero_point')} holds NaN or infinity"
        )
    half = float(1 << (scheme.bits - 1))
    shifted = values.float() + half
    if not torch.equal(shifted - half, values.float()):
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('zero_point')} holds zero points that fp32 does not "
            f"hold exactly after {half:.0f} is added to them: quantize with integers as zero points"
        )
    return shifted


def _int4_scheme(parts: Parts, scales: str, symmetric: bool, activation: Activation) -> QuantScheme:
    return QuantScheme(
        WEIGHT_TYPES["int4"],
        # Tiles are filled up before they are quantized.
        group_size=group_size(parts, stated_shape(parts), ragged=scales == "scale_and_zero"),
        symmetric=symmetric,
        activation=activation,
        scale_dtype=parts.store.dtype(parts.key(scales)),
    )


def _plain_scheme(parts: Parts) -> QuantScheme:
    # torchao leaves this out of the metadata where it is bf16.
    said: Any = parts.data.get("activation_dtype")
    if isinstance(said, dict):
        said = said.get("_data")
    known = {None: "none", "bfloat16": "none", "float8_e4m3fn": "fp8"}
    if said is not None and not (isinstance(said, str) and said in known):
        raise CheckpointError(f"{parts.where}: activation_dtype {brief(said)} is not supported")
    return _int4_scheme(parts, "scale", not parts.any("zero_point"), Activation(known[said]))


def _read_plain(parts: Parts, scheme: QuantScheme) -> _Fields:
    n, k = stated_shape(parts)
    groups = scheme.groups(k)
    _whole_words(parts, k, 2)
    packed = parts.take("qdata", (n, k // 2), (torch.int8, torch.uint8)).view(torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1) ^ 8
    offsets = parts.take("zero_point", (groups, n), FLOATS)
    return {
        "codes": codes,
        "scales": parts.take("scale", (groups, n), (scheme.scale_dtype,)).t().contiguous(),
        "input_factor": parts.input_factor(k),
        **_with_offsets(offsets.t(), scheme),
    }


def _with_offsets(offsets: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    """The fields that q * scale + offset has beyond its scales; codes are q + 8."""
    if scheme.symmetric:
        return {}
    zeros = torch.full(offsets.shape, 1 << (scheme.bits - 1), dtype=torch.uint8)
    return {"zeros": zeros, "offsets": offsets.contiguous()}


def _tiled_scheme(parts: Parts) -> QuantScheme:
    parts.shape("scale_and_zero", 3)
    offsets = parts.store.get(parts.key("scale_and_zero"))[..., 1:]
    return _int4_scheme(parts, "scale_and_zero", not bool(offsets.any()), Activation())


def _read_tiled(parts: Parts, scheme: QuantScheme) -> _Fields:
    n, k = stated_shape(parts)
    group = scheme.group_length(k)
    words = parts.take("qdata", (None, None, 32, 4), (torch.int32,))
    rows, columns = words.shape[0] * TILE_ROWS, words.shape[1] * TILE_COLUMNS
    if rows < n or columns < k:
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('qdata')} holds [{rows}, {columns}] codes, and the "
            f"metadata says that the weight is [{n}, {k}]"
        )
    groups = columns // group
    both = parts.take("scale_and_zero", (groups, rows, 2), (scheme.scale_dtype,))
    both = both[: scheme.groups(k), :n].transpose(0, 1)
    return {
        "codes": unpack_tinygemm(words)[:n, :k].contiguous(),
        "scales": both[..., 0].contiguous(),
        "input_factor": parts.input_factor(k),
        **_with_offsets(both[..., 1], scheme),
    }


def _words_scheme(parts: Parts) -> QuantScheme:
    if parts.store.dtype(parts.key("zero_point")) != torch.int8:
        raise CheckpointError(
            f"{parts.where}: zero points of the class {parts.kind} that are no int8 are those of "
            "Ascend NPUs, in an order of words that is not supported: quantize with another "
            "int4_packing_format"
        )
    return _int4_scheme(parts, "scale", False, Activation())


def _read_words(parts: Parts, scheme: QuantScheme) -> _Fields:
    n, k = stated_shape(parts)
    groups = scheme.groups(k)
    _whole_words(parts, k, 8)
    words = parts.take("qdata", (n, k // 8), (torch.int32,))
    zeros = parts.take("zero_point", (groups, n), (torch.int8,))
    if zeros.numel() and not 0 <= int(zeros.min()) <= int(zeros.max()) < 16:
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('zero_point')} must be in 0..15, got "
            f"{int(zeros.min())} to {int(zeros.max())}"
        )
    return {
        "codes": unpack_dense(words, k, 4),
        "scales": parts.take("scale", (groups, n), (scheme.scale_dtype,)).t().contiguous(),
        "zeros": zeros.t().contiguous().view(torch.uint8),
        "input_factor": parts.input_factor(k),
    }


def _whole_words(parts: Parts, k: int, codes: int) -> None:
    if k % codes:
        raise CheckpointError(
            f"{parts.where}: shape says {k} columns, which are no multiple of the {codes} that "
            f"{parts.key('qdata')} holds in each number"
        )


_INT4_ATTRIBUTES = frozenset(("block_size", "shape"))

INTEGERS: dict[str, TensorClass] = {
    "Int8Tensor": TensorClass(
        parts=frozenset(
            (
                *("qdata", "scale", "zero_point", "act_pre_scale"),
                *("act_quant_scale", "act_quant_zero_point"),
            )
        ),
        attributes=frozenset(("block_size", "dtype", "act_quant_kwargs", "reduce_range")),
        scheme=_unpacked_scheme,
        read=_read_unpacked,
    ),
    "IntxUnpackedToInt8Tensor": TensorClass(
        parts=frozenset(("qdata", "scale", "zero_point")),
        attributes=frozenset(("block_size", "dtype", "target_dtype", "activation_quantization")),
        scheme=_unpacked_scheme,
        read=_read_unpacked,
    ),
    "Int4Tensor": TensorClass(
        parts=frozenset(("qdata", "scale", "zero_point", "act_pre_scale")),
        attributes=_INT4_ATTRIBUTES | {"activation_dtype"},
        scheme=_plain_scheme,
        read=_read_plain,
    ),
    "Int4TilePackedTo4dTensor": TensorClass(
        parts=frozenset(("qdata", "scale_and_zero", "act_pre_scale")),
        attributes=_INT4_ATTRIBUTES,
        scheme=_tiled_scheme,
        read=_read_tiled,
    ),
    "Int4PlainInt32Tensor": TensorClass(
        parts=frozenset(("qdata", "scale", "zero_point", "act_pre_scale")),
        attributes=_INT4_ATTRIBUTES,
        scheme=_words_scheme,
        read=_read_words,
    ),
}
