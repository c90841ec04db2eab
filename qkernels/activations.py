"""Activations in 8 bits: quantized on their own, behind a normalization or a gate; as int8 shared
by layers.

The operators of `torch.ops.qkernels` that quantize rows, each with its reference in
`qkernels.reference`, and `QuantizedActivation`, which several `WQLinear`s take in place of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkernels.backends.rows import (
    CODES,
    QuantizedRows,
    RowInputs,
    make_row_problem,
    select_rows,
)
from qkernels.errors import WeightError
from qkernels.ops import X_DTYPES

_library = torch.library.Library("qkernels", "FRAGMENT")
_FLOAT8 = torch.float8_e4m3fn
for _suffix in ("", "_float8"):
    _library.define(f"quantize_per_token{_suffix}(Tensor x) -> (Tensor, Tensor)")
    _library.define(f"quantize_per_tensor{_suffix}(Tensor x, Tensor? scale) -> (Tensor, Tensor)")
_library.define("quantize_per_token_asymmetric(Tensor x) -> (Tensor, Tensor, Tensor)")
_FUSED = {
    "rms_norm_quantize": ("Tensor x, Tensor? gain, float epsilon", 2),
    "add_rms_norm_quantize": ("Tensor x, Tensor residual, Tensor? gain, float epsilon", 3),
    "layer_norm_quantize": ("Tensor x, Tensor? gain, Tensor? bias, float epsilon", 2),
    "silu_mul_quantize": ("Tensor gate, Tensor up", 2),
    "gelu_mul_quantize": ("Tensor gate, Tensor up, str approximate", 2),
}
"""What they take, and how many tensors they give. NAME_rounded gives one more, the rows in x's
type, of which the other results are then made."""

for _name, (_takes, _gives) in _FUSED.items():
    _library.define(f"{_name}({_takes}) -> ({', '.join(['Tensor'] * _gives)})")
    _library.define(f"{_name}_rounded({_takes}) -> ({', '.join(['Tensor'] * (_gives + 1))})")


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """x as int8, made once for all layers that read it.

    With a scale for each token, layers of schemes with int8 activations per token take it, those
    with 4-bit ones do not. Under a static scale, layers take it that have the same.

    Attributes:
        values: int8 [..., K].
        scale: fp32 [..., 1]; x is about (values - static_zero) * scale.
        dtype: of the outputs of layers that take it.
        static_scale: fp32 [], what `scale` is for all rows but those with NaN or infinity, which
            have NaN; None where each token has its own.
        static_zero: int32 [], or None where there is no zero point.
        rounded: [..., K] of `dtype`, what was quantized, where that was asked for.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None
    rounded: Tensor | None = None


def _check(x: Tensor, name: str = "x") -> None:
    if x.dim() == 0 or x.dtype not in X_DTYPES:
        raise WeightError(
            f"{name} must be [..., K] of fp16, bf16 or fp32, got {x.dtype} {list(x.shape)}"
        )


def _check_same(x: Tensor, other: Tensor, name: str) -> None:
    _check(x)
    if other.shape != x.shape or other.dtype != x.dtype or other.device != x.device:
        raise WeightError(
            f"{name} must be like x, {x.dtype} {list(x.shape)} on {x.device}, got {other.dtype} "
            f"{list(other.shape)} on {other.device}"
        )


def _check_vector(x: Tensor, vector: Tensor | None, name: str) -> None:
    if vector is not None and (vector.shape != x.shape[-1:] or vector.dtype not in X_DTYPES):
        raise WeightError(
            f"{name} must be {[x.shape[-1]]} of fp16, bf16 or fp32, got {vector.dtype} "
            f"{list(vector.shape)}"
        )


_GELUS = {"none": "gelu_mul", "tanh": "gelu_tanh_mul"}


def _check_gelu(gate: Tensor, up: Tensor, approximate: str) -> None:
    _check_same(gate, up, "up")
    if approximate not in _GELUS:
        raise WeightError(f"approximate must be one of {', '.join(_GELUS)}, got {approximate!r}")


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _quantize(
    x: Tensor,
    kind: str = "plain",
    scale_of: str = "token",
    rounds: bool = False,
    codes: torch.dtype = torch.int8,
    **more: Any,
) -> QuantizedRows:
    """Rows of x [..., K] by the row kernel that is chosen for them; `more` as in `RowInputs`."""
    problem = make_row_problem(kind, scale_of, x, rounds, codes)
    return select_rows(problem).run(problem, RowInputs(x=_rows(x), **more))


def _shaped(x: Tensor, rows: QuantizedRows) -> tuple[Tensor, Tensor]:
    return rows.values.view(x.shape), rows.scale.view(*x.shape[:-1], 1)


def _fused(x: Tensor, kind: str, rounds: bool, **more: Any) -> tuple[Tensor, ...]:
    """int8, scales, x + residual where there is one, and rounded rows where they are asked for."""
    rows = _quantize(x, kind, rounds=rounds, **more)
    others = (t.view(x.shape) for t in (rows.total, rows.rounded) if t is not None)
    return *_shaped(x, rows), *others


def _quantize_per_token(x: Tensor, codes: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    _check(x)
    return _shaped(x, _quantize(x, codes=codes))


def _quantize_per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    rows = _quantize(x, scale_of="asymmetric")
    assert rows.zero is not None
    return *_shaped(x, rows), rows.zero.view(*x.shape[:-1], 1)


def _quantize_per_tensor(
    x: Tensor, scale: Tensor | None, codes: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    _check(x)
    if scale is not None and (scale.dim() or scale.dtype != torch.float32):
        raise WeightError(f"scale must be float32 [], got {scale.dtype} {list(scale.shape)}")
    if scale is None:
        rows = _quantize(x, scale_of="tensor", codes=codes)
        return rows.values.view(x.shape), rows.scale
    rows = _quantize(x, scale_of="static", codes=codes, scale=scale)
    return rows.values.view(x.shape), scale.clone()


def _rms_norm_quantize(
    x: Tensor, gain: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check(x)
    _check_vector(x, gain, "gain")
    return _fused(x, "rms_norm", rounds, gain=gain, epsilon=epsilon)


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, gain: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check_same(x, residual, "residual")
    _check_vector(x, gain, "gain")
    return _fused(x, "rms_norm", rounds, other=_rows(residual), gain=gain, epsilon=epsilon)


def _layer_norm_quantize(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check(x)
    _check_vector(x, gain, "gain")
    _check_vector(x, bias, "bias")
    return _fused(x, "layer_norm", rounds, gain=gain, bias=bias, epsilon=epsilon)


def _silu_mul_quantize(gate: Tensor, up: Tensor, rounds: bool = False) -> tuple[Tensor, ...]:
    _check_same(gate, up, "up")
    return _fused(gate, "silu_mul", rounds, other=_rows(up))


def _gelu_mul_quantize(
    gate: Tensor, up: Tensor, approximate: str, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check_gelu(gate, up, approximate)
    return _fused(gate, _GELUS[approximate], rounds, other=_rows(up))


def _empty(x: Tensor, codes: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=codes, device=x.device),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _token_fake(x: Tensor, codes: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    _check(x)
    return _empty(x, codes)


def _asymmetric_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    return *_empty(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.int32)


def _tensor_fake(
    x: Tensor, scale: Tensor | None, codes: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    _check(x)
    return _empty(x, codes)[0], x.new_empty((), dtype=torch.float32)


def _fused_fake(x: Tensor, rounds: bool, adds: bool = False) -> tuple[Tensor, ...]:
    others = (x.new_empty(x.shape) for asked in (adds, rounds) if asked)
    return *_empty(x), *others


def _rms_norm_fake(
    x: Tensor, gain: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check(x)
    _check_vector(x, gain, "gain")
    return _fused_fake(x, rounds)


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, gain: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check_same(x, residual, "residual")
    _check_vector(x, gain, "gain")
    return _fused_fake(x, rounds, adds=True)


def _layer_norm_fake(
    x: Tensor, gain: Tensor | None, bias: Tensor | None, epsilon: float, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check(x)
    _check_vector(x, gain, "gain")
    _check_vector(x, bias, "bias")
    return _fused_fake(x, rounds)


def _silu_mul_fake(gate: Tensor, up: Tensor, rounds: bool = False) -> tuple[Tensor, ...]:
    _check_same(gate, up, "up")
    return _fused_fake(gate, rounds)


def _gelu_mul_fake(
    gate: Tensor, up: Tensor, approximate: str, rounds: bool = False
) -> tuple[Tensor, ...]:
    _check_gelu(gate, up, approximate)
    return _fused_fake(gate, rounds)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_per_token": (_quantize_per_token, _token_fake),
    "quantize_per_token_asymmetric": (_quantize_per_token_asymmetric, _asymmetric_fake),
    "quantize_per_tensor": (_quantize_per_tensor, _tensor_fake),
    "rms_norm_quantize": (_rms_norm_quantize, _rms_norm_fake),
    "add_rms_norm_quantize": (_add_rms_norm_quantize, _add_rms_norm_fake),
    "layer_norm_quantize": (_layer_norm_quantize, _layer_norm_fake),
    "silu_mul_quantize": (_silu_mul_quantize, _silu_mul_fake),
    "gelu_mul_quantize": (_gelu_mul_quantize, _gelu_mul_fake),
}
_IMPLEMENTATIONS |= {
    f"{name}_rounded": (partial(run, rounds=True), partial(fake, rounds=True))
    for name, (run, fake) in _IMPLEMENTATIONS.items()
    if name in _FUSED
}
_IMPLEMENTATIONS |= {
    f"{name}_float8": (partial(run, codes=_FLOAT8), partial(fake, codes=_FLOAT8))
    for name, (run, fake) in _IMPLEMENTATIONS.items()
    if name in ("quantize_per_token", "quantize_per_tensor")
}

for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)


def _call(name: str, rounded: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """What an operator gives; rounded rows or None at the end."""
    if rounded:
        return getattr(torch.ops.qkernels, f"{name}_rounded")(*arguments)
    return *getattr(torch.ops.qkernels, name)(*arguments), None


def _operator(name: str, dtype: torch.dtype) -> Any:
    if dtype not in CODES:
        accepted = ", ".join(map(str, CODES))
        raise WeightError(f"dtype must be one of {accepted}, got {dtype}")
    return getattr(torch.ops.qkernels, f"{name}_float8" if dtype == _FLOAT8 else name)


def quantize_per_token(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """x in 8 bits [..., K] and its scales fp32 [..., 1]: s = max|x| / 127, or / 448 in
    float8_e4m3fn; q = x / s rounded half to even.

    Args:
        x: [..., K], fp16, bf16 or fp32. An all-zero row has s = 1; a row with NaN or infinity has
            s = NaN or infinity.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Raises:
        WeightError: for another dtype.
    """
    return _operator("quantize_per_token", dtype)(x)


def quantize_per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [..., K], scales fp32 [..., 1] and zero points int32 [..., 1].

    x is about s * (q - zero). The range of a row, which includes 0, is spread over all 256 codes.

    Args:
        x: [..., K], fp16, bf16 or fp32. A row with NaN or infinity has s = NaN.

    Raises:
        WeightError: for another dtype.
    """
    return torch.ops.qkernels.quantize_per_token_asymmetric(x)


def quantize_per_tensor(
    x: Tensor, scale: Tensor | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """x in 8 bits [..., K] and one scale fp32 []: `scale`, or max|x| / 127, or / 448 in
    float8_e4m3fn, where it is None.

    Numbers beyond a given scale's range saturate.

    Raises:
        WeightError: for another dtype, as in `quantize_per_token`, or a scale that is not fp32 [].
    """
    return _operator("quantize_per_tensor", dtype)(x, scale)


def quantize_activation(x: Tensor) -> QuantizedActivation:
    """`quantize_per_token` for layers that share x, such as the projections to q, k and v.

    They have int8 activations per token; those of other schemes refuse it.
    """
    quantized, scale = quantize_per_token(x)
    return QuantizedActivation(quantized, scale, x.dtype)


def rms_norm_quantize(
    x: Tensor, gain: Tensor | None, epsilon: float = 1e-6, *, rounded: bool = False
) -> QuantizedActivation:
    """x / sqrt(mean(x^2) + epsilon) * gain, computed in fp32 and quantized per token in one pass.

    Args:
        x: [..., K], fp16, bf16 or fp32.
        gain: [K] of such a type, or None.
        rounded: whether to give it in x's type too, and quantize it as rounded.
    """
    values, scale, y = _call("rms_norm_quantize", rounded, x, gain, epsilon)
    return QuantizedActivation(values, scale, x.dtype, rounded=y)


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    gain: Tensor | None,
    epsilon: float = 1e-6,
    *,
    rounded: bool = False,
) -> tuple[QuantizedActivation, Tensor]:
    """`rms_norm_quantize` of x + residual, and that sum, rounded to their type."""
    values, scale, total, y = _call(
        *("add_rms_norm_quantize", rounded, x, residual, gain, epsilon),
    )
    return QuantizedActivation(values, scale, x.dtype, rounded=y), total


def layer_norm_quantize(
    x: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    epsilon: float = 1e-5,
    *,
    rounded: bool = False,
) -> QuantizedActivation:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * gain + bias, computed in fp32 and quantized per
    token in one pass; the variance is that of the row, not an estimate from it.

    Args:
        x: [..., K], fp16, bf16 or fp32.
        gain, bias: [K] of such a type, or None.
        rounded: as in `rms_norm_quantize`.
    """
    values, scale, y = _call("layer_norm_quantize", rounded, x, gain, bias, epsilon)
    return QuantizedActivation(values, scale, x.dtype, rounded=y)


def silu_mul_quantize(gate: Tensor, up: Tensor, *, rounded: bool = False) -> QuantizedActivation:
    """silu(gate) * up, computed in fp32 and quantized per token in one pass.

    Args:
        gate, up: [..., K] of one type, fp16, bf16 or fp32.
        rounded: as in `rms_norm_quantize`.
    """
    values, scale, y = _call("silu_mul_quantize", rounded, gate, up)
    return QuantizedActivation(values, scale, gate.dtype, rounded=y)


def gelu_mul_quantize(
    gate: Tensor, up: Tensor, approximate: str = "none", *, rounded: bool = False
) -> QuantizedActivation:
    """gelu(gate) * up, computed in fp32 and quantized per token in one pass.

    Args:
        gate, up: [..., K] of one type, fp16, bf16 or fp32.
        approximate: "none" for gate * Phi(gate), or "tanh", as in `torch.nn.functional.gelu`.
        rounded: as in `rms_norm_quantize`.

    Raises:
        WeightError: for another approximation.
    """
    values, scale, y = _call("gelu_mul_quantize", rounded, gate, up, approximate)
    return QuantizedActivation(values, scale, gate.dtype, rounded=y)
