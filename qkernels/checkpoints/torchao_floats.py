"""Tensor classes of torchao that hold floats of 8 and 4 bits.

Float8Tensor  _weight_qdata float8 [N, K], _weight_scale [N / rows, K / columns]
MXTensor      _weight_qdata float8 [N, K], or uint8 [N, K/2] of E2M1 numbers, the even column in the
              low bits; _weight_scale float8 E8M0 [N, K/32], powers of two
NVFP4Tensor   _weight_qdata uint8 [N, K/2] of E2M1 numbers, _weight_scale float8 E4M3 [N, K/16],
              _weight_per_tensor_scale fp32 or none: w = number * (per_tensor_scale * scale)

Scales of the last two may be "swizzled", in the order that cuBLAS takes: tiles of 128 rows and 4
columns, filled up, in which a row of 16 holds rows r, r + 32, r + 64 and r + 96.

Inputs in groups of floats are read as 16-bit ones, nearer to the unquantized model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qkernels.checkpoints.config import brief, typed
from qkernels.checkpoints.torchao_parts import (
    Parts,
    TensorClass,
    block,
    quantized_inputs,
    type_and_data,
)
from qkernels.errors import CheckpointError
from qkernels.scheme import WEIGHT_TYPES, Activation, QuantScheme

_Fields = Mapping[str, Tensor | None]
_FLOAT8 = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}
_MX_TYPES = {
    "float8_e4m3fn": "fp8e4m3",
    "float8_e5m2": "fp8e5m2",
    "float4_e2m1fn_x2": "fp4",
}


def _float8_scheme(parts: Parts) -> QuantScheme:
    shape, dtype = parts.shape("qdata", 2), parts.store.dtype(parts.key("qdata"))
    if dtype not in _FLOAT8:
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('qdata')} must be float8_e4m3fn or float8_e5m2, "
            f"got {dtype}"
        )
    sizes, scales = block(parts, shape), parts.key("scale")
    return QuantScheme(
        WEIGHT_TYPES[_FLOAT8[dtype]],
        group_size=None if sizes is None else sizes[1],
        per_tensor=sizes is None and parts.store.shape(scales) != (shape[0], 1),
        activation=quantized_inputs(parts, "QuantizeTensorToFloat8Kwargs", "fp8"),
        scale_dtype=parts.store.dtype(scales),
    )


def _read_float8(parts: Parts, scheme: QuantScheme) -> _Fields:
    n, k = parts.shape("qdata", 2)
    sizes = block(parts, (n, k))
    rows = 1 if sizes is None else sizes[0]
    shape = (1, 1) if scheme.per_tensor else (-(-n // rows), scheme.groups(k))
    scales = parts.parameter("scale", shape, (scheme.scale_dtype,))
    return {
        "codes": parts.take("qdata", (n, k), tuple(_FLOAT8)).view(torch.uint8),
        "scales": scales if rows == 1 else scales[torch.arange(n) // rows],
    }


def _microscaled_scheme(parts: Parts) -> QuantScheme:
    size = typed(parts.data.get("block_size"), int, f"{parts.where}: block_size")
    return QuantScheme(
        WEIGHT_TYPES[_element_type(parts)],
        group_size=size,
        activation=Activation(),
        scale_dtype=torch.float32,
    )


def _element_type(parts: Parts) -> str:
    if parts.kind == "NVFP4Tensor":
        return "fp4"
    where = f"{parts.where}: elem_dtype"
    value = parts.data.get("elem_dtype")
    name = type_and_data(value, where)[1] if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in _MX_TYPES:
        raise CheckpointError(f"{where} {brief(name)} is not supported: {', '.join(_MX_TYPES)} are")
    return _MX_TYPES[name]


def _read_microscaled(parts: Parts, scheme: QuantScheme) -> _Fields:
    if scheme.weight.name == "fp4":
        n, half = parts.shape("qdata", 2)
        packed = parts.take("qdata", (n, half), (torch.uint8,))
        codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    else:
        shape, dtype = parts.shape("qdata", 2), scheme.weight.float_dtype
        assert dtype is not None
        codes = parts.take("qdata", shape, (dtype,)).view(torch.uint8)
    groups = scheme.groups(codes.shape[1])
    if codes.shape[1] % scheme.group_length(codes.shape[1]):
        raise CheckpointError(
            f"{parts.where}: block_size {scheme.group_size} does not divide {codes.shape[1]} "
            "columns"
        )
    stored = _in_order(parts, codes.shape[0], groups)
    if parts.kind == "NVFP4Tensor":
        scales = stored.float()
        if "per_tensor_scale" in parts.names:
            scales = parts.one("per_tensor_scale", (torch.float32,)) * scales
        return {"codes": codes, "scales": scales}
    exponents = stored.view(torch.uint8)
    if (exponents == 255).any():
        raise CheckpointError(
            f"{parts.store.folder}: {parts.key('scale')} holds 255, which stands for NaN"
        )
    return {
        "codes": codes,
        "scales": torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127),
    }


def _in_order(parts: Parts, n: int, groups: int) -> Tensor:
    """The scales [N, G], put into the order of the weight where they are swizzled."""
    nv = parts.kind == "NVFP4Tensor"
    dtypes = (torch.float8_e4m3fn,) if nv else (torch.float8_e8m0fnu, torch.uint8)
    where = f"{parts.where}: is_swizzled_scales"
    if not typed(parts.data.get("is_swizzled_scales", False), bool, where):
        return parts.take("scale", (n, groups), dtypes)
    rows, columns = -(-n // 128), -(-groups // 4)
    stored = parts.take("scale", (32 * rows, 16 * columns), dtypes).view(torch.uint8)
    tiles = stored.reshape(rows, columns, 32, 4, 4).permute(0, 3, 2, 1, 4)
    ordered = tiles.reshape(128 * rows, 4 * columns)[:n, :groups].contiguous()
    return ordered.view(torch.float8_e4m3fn) if nv else ordered


FLOAT_CLASSES: dict[str, TensorClass] = {
    "Float8Tensor": TensorClass(
        parts=frozenset(("qdata", "scale")),
        attributes=frozenset(
            ("block_size", "dtype", "act_quant_kwargs", "mm_config", "kernel_preference")
        ),
        scheme=_float8_scheme,
        read=_read_float8,
    ),
    "MXTensor": TensorClass(
        parts=frozenset(("qdata", "scale")),
        attributes=frozenset(
            (
                *("elem_dtype", "block_size", "orig_dtype", "kernel_preference"),
                *("act_quant_kwargs", "is_swizzled_scales"),
            )
        ),
        scheme=_microscaled_scheme,
        read=_read_microscaled,
    ),
    "NVFP4Tensor": TensorClass(
        parts=frozenset(("qdata", "scale", "per_tensor_scale", "act_per_tensor_scale")),
        attributes=frozenset(
            (
                *("block_size", "orig_dtype", "is_swizzled_scales", "use_triton_kernel"),
                "act_quant_kwargs",
            )
        ),
        scheme=_microscaled_scheme,
        read=_read_microscaled,
    ),
}
