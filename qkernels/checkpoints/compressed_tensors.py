"""The compressed-tensors format, which Transformers and vLLM read: one layer's tensors and config.

pack-quantized   weight_packed int32 [N, ceil(K*b/32)]   the plain layout's words
                 weight_scale [N, G], weight_zero_point int32 [ceil(N*b/32), G] packed along N,
                 weight_shape int64 [2]
int-quantized    weight int8 [N, K] = code - 128, weight_scale
float-quantized  weight float8 [N, K], weight_scale

weight_scale is [N, 1] per channel and [1] per tensor; input_scale [1] goes with static activations.
Source: the compressed-tensors package (Neural Magic, Apache-2.0), read as documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import dense_words, pack_dense, unpack_dense
from qkernels.errors import CheckpointError, QuantizationError
from qkernels.scheme import WEIGHT_TYPES, Activation, QuantScheme
from qkernels.weight import QuantizedWeight

PACKED, INTEGER, FLOAT = "pack-quantized", "int-quantized", "float-quantized"

TENSOR_NAMES = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape"),
    *("weight_g_idx", "input_scale", "input_zero_point", "bias"),
)
"""Every tensor a quantized layer may have."""


def format_of(scheme: QuantScheme) -> str:
    """The format that holds `scheme`.

    Raises:
        CheckpointError: where none does, with what can be saved.
    """
    reason = None
    if scheme.weight.kind == "codebook":
        reason = f"{scheme.weight.name} codebooks"
    elif scheme.scale_levels != "one":
        reason = "scales of several levels (-flat has one)"
    elif scheme.weight.name == "fp8e5m2":
        reason = "float8 E5M2 weights"
    if reason is not None:
        raise CheckpointError(
            f"compressed-tensors does not hold {reason}, and the model has {scheme}: save a model "
            "with linear or fp8e4m3 weights, such as w4a16-g128, w8a16, w8a8 or fp8-a8"
        )
    if scheme.weight.kind == "float8":
        return FLOAT
    return INTEGER if scheme.integer_activation and scheme.bits == 8 else PACKED


def write_layer(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of one layer, by their names below the layer's.

    Raises:
        CheckpointError: for a scheme or column order that the format does not hold.
    """
    scheme, kind = weight.scheme, format_of(weight.scheme)
    if weight.perm is not None:
        raise CheckpointError("compressed-tensors does not hold a column order (perm)")
    scales = weight.scales.flatten() if scheme.per_tensor else weight.scales
    tensors = {"weight_scale": scales.contiguous()}
    if kind == PACKED:
        tensors["weight_packed"] = pack_dense(weight.codes, scheme.bits)
        tensors["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    elif kind == INTEGER:
        tensors["weight"] = (weight.codes ^ 128).view(torch.int8)
    else:
        assert scheme.weight.float_dtype is not None
        tensors["weight"] = weight.codes.view(scheme.weight.float_dtype)
    if weight.zeros is not None:
        if weight.zeros.dtype != torch.uint8:
            raise CheckpointError("compressed-tensors does not hold real zero points")
        tensors["weight_zero_point"] = (
            pack_dense(weight.zeros.t().contiguous(), scheme.bits).t().contiguous()
        )
    if weight.activation_scale is not None:
        tensors["input_scale"] = weight.activation_scale.reshape(1)
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def read_layer(name: str, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:
    """A layer from its tensors, whose scale type may differ from that of `scheme`.

    Raises:
        CheckpointError: naming the tensor that is missing or does not fit.
    """

    def take(part: str) -> Tensor:
        if part not in tensors:
            raise CheckpointError(f"{name}.{part} is missing")
        return tensors[part]

    if "weight_g_idx" in tensors and int(tensors["weight_g_idx"].min()) >= 0:
        raise CheckpointError(f"{name}.weight_g_idx: column orders are not supported here")
    scales = take("weight_scale")
    scheme = _with_scale_dtype(scheme, scales.dtype)
    kind = format_of(scheme)
    zeros: Tensor | None = None
    if kind == PACKED:
        n, k = _shape(name, take("weight_shape"))
        words = take("weight_packed")
        if words.dtype != torch.int32 or tuple(words.shape) != (n, dense_words(k, scheme.bits)):
            raise CheckpointError(
                f"{name}.weight_packed must be int32 {[n, dense_words(k, scheme.bits)]} for "
                f"{scheme.bits} bits of [{n}, {k}], got {words.dtype} {list(words.shape)}"
            )
        codes = unpack_dense(words, k, scheme.bits)
    else:
        dtype = torch.int8 if kind == INTEGER else scheme.weight.float_dtype
        stored = take("weight")
        if stored.dtype != dtype or stored.dim() != 2:
            raise CheckpointError(
                f"{name}.weight must be {dtype} [N, K], got {stored.dtype} {list(stored.shape)}"
            )
        codes = stored.view(torch.uint8) ^ (128 if kind == INTEGER else 0)
        n, k = codes.shape
    if not scheme.symmetric:
        groups = 1 if scheme.per_tensor else scheme.groups(k)
        rows = 1 if scheme.per_tensor else n
        packed = take("weight_zero_point")
        if tuple(packed.shape) != (dense_words(rows, scheme.bits), groups):
            raise CheckpointError(
                f"{name}.weight_zero_point must be {[dense_words(rows, scheme.bits), groups]}, "
                f"got {list(packed.shape)}"
            )
        zeros = unpack_dense(packed.t().contiguous(), rows, scheme.bits).t().contiguous()
    static = scheme.activation.granularity == "static"
    if scheme.per_tensor:
        scales = scales.reshape(-1, 1)
    try:
        return QuantizedWeight(
            scheme=scheme,
            codes=codes,
            scales=scales,
            zeros=zeros,
            activation_scale=take("input_scale").float().reshape(()) if static else None,
            bias=tensors.get("bias"),
        )
    except QuantizationError as error:
        raise CheckpointError(f"{name}: {error}") from None


def write_config(layers: Mapping[str, QuantScheme], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model with these layers; `ignored` ones stay dense."""
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, scheme in layers.items():
        by_scheme.setdefault(scheme, []).append(name)
    formats = {format_of(scheme) for scheme in by_scheme}
    groups = {
        f"group_{i}": {
            "targets": names,
            "weights": _weight_arguments(scheme),
            "input_activations": _activation_arguments(scheme.activation),
            "output_activations": None,
            "format": format_of(scheme),
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def read_scheme(group: Mapping[str, Any]) -> QuantScheme:
    """The scheme of one of the `config_groups`, with fp16 or fp32 scales until they are read.

    Raises:
        CheckpointError: for arguments this package has no scheme for.
    """
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise CheckpointError(f"config group has no weights entry: {group}")
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    weight = WEIGHT_TYPES.get(f"int{bits}" if kind == "int" else f"fp{bits}e4m3")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if weight is None or strategy not in ("tensor", "channel", "group"):
        raise CheckpointError(f"weights of {bits} bits, type {kind}, {strategy} are not supported")
    try:
        return QuantScheme(
            weight=weight,
            group_size=weights["group_size"] if strategy == "group" else None,
            per_tensor=strategy == "tensor",
            symmetric=weights.get("symmetric", True),
            activation=_read_activation(inputs),
        )
    except QuantizationError as error:
        raise CheckpointError(f"config group {group}: {error}") from None


def _weight_arguments(scheme: QuantScheme) -> dict[str, Any]:
    grouped = scheme.group_size is not None
    return {
        "num_bits": scheme.bits,
        "type": "float" if scheme.weight.kind == "float8" else "int",
        "symmetric": scheme.symmetric,
        "strategy": "tensor" if scheme.per_tensor else "group" if grouped else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }


def _activation_arguments(activation: Activation) -> dict[str, Any] | None:
    if activation.dtype == "none":
        return None
    return {
        "num_bits": 8,
        "type": "int" if activation.dtype == "int8" else "float",
        "symmetric": True,
        "strategy": "token" if activation.granularity == "token" else "tensor",
        "dynamic": activation.granularity != "static",
    }


def _read_activation(arguments: Mapping[str, Any] | None) -> Activation:
    if not arguments:
        return Activation()
    if arguments.get("num_bits") != 8 or not arguments.get("symmetric", True):
        raise CheckpointError(f"input activations {dict(arguments)} are not supported")
    dtype = "int8" if arguments.get("type", "int") == "int" else "fp8"
    dynamic = bool(arguments.get("dynamic"))
    granularity = {
        ("token", True): "token",
        ("tensor", True): "tensor",
        ("tensor", False): "static",
    }.get((str(arguments.get("strategy")), dynamic))
    if granularity is None:
        raise CheckpointError(f"input activations {dict(arguments)} are not supported")
    return Activation(dtype, granularity)


def _with_scale_dtype(scheme: QuantScheme, dtype: torch.dtype) -> QuantScheme:
    return QuantScheme(
        **{**{f: getattr(scheme, f) for f in scheme.__dataclass_fields__}, "scale_dtype": dtype}
    )


def _shape(name: str, stored: Tensor) -> tuple[int, int]:
    if stored.numel() != 2:
        raise CheckpointError(f"{name}.weight_shape must hold 2 sizes, got {stored.tolist()}")
    n, k = (int(size) for size in stored)
    return n, k
