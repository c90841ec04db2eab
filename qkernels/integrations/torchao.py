"""torchao's configs as schemes: `scheme_of(config)` is what `qkernels.quantize_model` takes.

    report = qk.quantize_model(model, "rtn", scheme_of(Int8WeightOnlyConfig()))

A scheme says the same as its config: bits, what shares a scale, zero points or none, and how inputs
are quantized. Scales and zero points are fitted by our own rules (docs/design.md), which are
torchao's for its integer and float8 tensors; its packed int4 classes alone have real zero points,
where ours are integers. Configs are known by the names of their classes, and torchao is not
imported.
Source: the torchao package (Meta, BSD-3-Clause), read as documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qkernels.errors import SchemeError
from qkernels.scheme import QuantScheme

_SCALES = {torch.float16: "sfp16", torch.bfloat16: "sbf16", torch.float32: "sfp32"}
_FLOAT8 = {torch.float8_e4m3fn: "fp8e4m3", torch.float8_e5m2: "fp8e5m2"}


def scheme_of(config: Any) -> str:
    """The scheme that quantizes as a config of torchao does.

    Args:
        config: an `Int4WeightOnlyConfig`, `Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`,
            `Float8WeightOnlyConfig`, or one of those with 8-bit activations.

    Raises:
        SchemeError: for another config, or with what of it has no equal.
    """
    name = type(config).__name__
    if name not in _CONFIGS:
        raise SchemeError(f"a {name} has no equal: known are {', '.join(_CONFIGS)}")
    try:
        return str(QuantScheme.parse("-".join(_CONFIGS[name](config))))
    except SchemeError as error:
        raise SchemeError(f"a {name} has no equal: {error}") from None


def _named(value: Any) -> str:
    """A granularity by its class, a member of an enumeration by its name."""
    return str(getattr(value, "name", None) or getattr(value, "value", None) or value).upper()


def _refuse_unless(config: Any, **usual: Any) -> None:
    """Raises for an option with no equal that is not as usual."""
    for option, value in usual.items():
        given = getattr(config, option, value)
        if given != value and _named(given) != value:
            raise SchemeError(f"{option}={given!r} is not supported: leave it as it is by default")


def _shares(granularity: Any) -> list[str]:
    """What of a weight shares a scale."""
    kind = type(granularity).__name__
    if kind == "PerRow" or (kind == "PerAxis" and granularity.axis == 0):
        return []
    if kind == "PerTensor":
        return ["gtensor"]
    if kind == "PerGroup":
        return [f"g{granularity.group_size}"]
    raise SchemeError(f"weights by {granularity!r} are not supported")


def _inputs(granularity: Any, has_zeros: bool) -> list[str]:
    """What of dynamically quantized inputs shares a scale."""
    kind = type(granularity).__name__
    if kind in ("PerRow", "PerToken"):
        return ["tokenasym"] if has_zeros else []
    if kind == "PerTensor" and not has_zeros:
        return ["tensor"]
    zeros = " with zero points" if has_zeros else ""
    raise SchemeError(f"inputs by {granularity!r}{zeros} are not supported")


def _both(granularity: Any) -> tuple[Any, Any]:
    """The granularities of inputs and weights."""
    if isinstance(granularity, (list, tuple)):
        inputs, weights = granularity
        return inputs, weights
    return granularity, granularity


def _has_zeros(mapping: Any) -> bool:
    name = _named(mapping)
    if name not in ("SYMMETRIC", "ASYMMETRIC"):
        raise SchemeError(f"the mapping {name} fits scales in a way of its own")
    return name == "ASYMMETRIC"


def _bits(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if not name.startswith("int"):
        raise SchemeError(f"weights of {dtype} are not supported")
    return int(name.removeprefix("int"))


def _scale_type(dtype: torch.dtype | None) -> list[str]:
    if dtype is not None and dtype not in _SCALES:
        raise SchemeError(f"scales of {dtype} are not supported")
    return [] if dtype is None else [_SCALES[dtype]]


def _int4(config: Any) -> list[str]:
    _refuse_unless(config, int4_choose_qparams_algorithm="TINYGEMM")
    return ["w4a16", f"g{config.group_size}"]


def _int4_float8(config: Any) -> list[str]:
    return ["w4afp8", "g128", "sym"]


def _int8(config: Any) -> list[str]:
    size = getattr(config, "group_size", None)
    shared = [f"g{size}"] if size is not None else _shares(config.granularity)
    return ["w8a16", *shared, "sym"]


def _int8_int8(config: Any) -> list[str]:
    _refuse_unless(config, weight_only_decode=False, reduce_range=False)
    inputs, weights = _both(config.granularity)
    zeros = _has_zeros(config.act_mapping_type)
    return ["w8a8", *_shares(weights), *_inputs(inputs, zeros)]


def _int8_static(config: Any) -> list[str]:
    _refuse_unless(config, reduce_range=False)
    inputs, weights = _both(config.granularity)
    if type(inputs).__name__ != "PerTensor":
        raise SchemeError(f"static scales of inputs by {inputs!r} are not supported")
    static = "staticasym" if _has_zeros(config.act_mapping_type) else "static"
    return ["w8a8", *_shares(weights), static]


def _intx(config: Any) -> list[str]:
    _refuse_unless(config, intx_choose_qparams_algorithm="AFFINE")
    zeros = "asym" if _has_zeros(config.mapping_type) else "sym"
    head = f"w{_bits(config.weight_dtype)}a16"
    return [head, *_shares(config.granularity), zeros, *_scale_type(config.scale_dtype)]


def _int8_intx(config: Any) -> list[str]:
    _refuse_unless(config, intx_choose_qparams_algorithm="AFFINE")
    zeros = "asym" if _has_zeros(config.weight_mapping_type) else "sym"
    shared = _shares(config.weight_granularity)
    inputs = ["tokenasym"] if _has_zeros(config.act_mapping_type) else []
    levels = ["flat"] if shared else []
    head = f"w{_bits(config.weight_dtype)}a8"
    return [head, *shared, zeros, *inputs, *levels, *_scale_type(config.weight_scale_dtype)]


def _float8(config: Any) -> list[str]:
    return [_float_head(config.weight_dtype), "a16", *_shares(config.granularity), "sfp32"]


def _float8_float8(config: Any) -> list[str]:
    _refuse_unless(
        config,
        activation_dtype=torch.float8_e4m3fn,
        activation_value_lb=None,
        activation_value_ub=None,
        packing_format="PLAIN",
    )
    inputs, weights = _both(config.granularity)
    return [_float_head(config.weight_dtype), "a8", *_shares(weights), *_inputs(inputs, False)]


def _float_head(dtype: torch.dtype) -> str:
    if dtype not in _FLOAT8:
        raise SchemeError(f"weights of {dtype} are not supported")
    return _FLOAT8[dtype]


_CONFIGS: dict[str, Callable[[Any], list[str]]] = {
    "Int4WeightOnlyConfig": _int4,
    "Float8DynamicActivationInt4WeightConfig": _int4_float8,
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8_int8,
    "Int8StaticActivationInt8WeightConfig": _int8_static,
    "IntxWeightOnlyConfig": _intx,
    "Int8DynamicActivationIntxWeightConfig": _int8_intx,
    "Float8WeightOnlyConfig": _float8,
    "Float8DynamicActivationFloat8WeightConfig": _float8_float8,
}
