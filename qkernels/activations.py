"""int8 activations: quantized on their own, behind a normalization or a gate; shared by layers.

The operators of `torch.ops.qkernels` that quantize rows, each with its reference in
`qkernels.reference`, and `QuantizedActivation`, which several `WQLinear`s take in place of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.backends.rows import QuantizedRows, RowInputs
from qkernels.errors import WeightError
from qkernels.ops import X_DTYPES
from qkernels.select import make_row_problem, select_rows

_library = torch.library.Library("qkernels", "FRAGMENT")
_library.define("quantize_per_token(Tensor x) -> (Tensor, Tensor)")
_library.define("quantize_per_token_asymmetric(Tensor x) -> (Tensor, Tensor, Tensor)")
_library.define("quantize_per_tensor(Tensor x, Tensor? scale) -> (Tensor, Tensor)")
_library.define("rms_norm_quantize(Tensor x, Tensor? gain, float epsilon) -> (Tensor, Tensor)")
_library.define(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor? gain, float epsilon) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define("silu_mul_quantize(Tensor gate, Tensor up) -> (Tensor, Tensor)")


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
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
    static_scale: Tensor | None = None
    static_zero: Tensor | None = None


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


def _check_gain(x: Tensor, gain: Tensor | None) -> None:
    if gain is not None and (gain.shape != x.shape[-1:] or gain.dtype not in X_DTYPES):
        raise WeightError(
            f"gain must be {[x.shape[-1]]} of fp16, bf16 or fp32, got {gain.dtype} "
            f"{list(gain.shape)}"
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _quantize(
    x: Tensor, kind: str = "plain", scale_of: str = "token", **more: Any
) -> QuantizedRows:
    """Rows of x [..., K] by the row kernel that is chosen for them; `more` as in `RowInputs`."""
    problem = make_row_problem(kind, scale_of, x)
    return select_rows(problem).run(problem, RowInputs(x=_rows(x), **more))


def _shaped(x: Tensor, rows: QuantizedRows) -> tuple[Tensor, Tensor]:
    return rows.values.view(x.shape), rows.scale.view(*x.shape[:-1], 1)


def _quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    return _shaped(x, _quantize(x))


def _quantize_per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    rows = _quantize(x, scale_of="asymmetric")
    assert rows.zero is not None
    return *_shaped(x, rows), rows.zero.view(*x.shape[:-1], 1)


def _quantize_per_tensor(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x)
    if scale is not None and (scale.dim() or scale.dtype != torch.float32):
        raise WeightError(f"scale must be float32 [], got {scale.dtype} {list(scale.shape)}")
    if scale is None:
        rows = _quantize(x, scale_of="tensor")
        return rows.values.view(x.shape), rows.scale
    rows = _quantize(x, scale_of="static", scale=scale)
    return rows.values.view(x.shape), scale.clone()


def _rms_norm_quantize(x: Tensor, gain: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    _check(x)
    _check_gain(x, gain)
    return _shaped(x, _quantize(x, "rms_norm", gain=gain, epsilon=epsilon))


def _add_rms_norm_quantize(
    x: Tensor, residual: Tensor, gain: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same(x, residual, "residual")
    _check_gain(x, gain)
    rows = _quantize(x, "rms_norm", other=_rows(residual), gain=gain, epsilon=epsilon)
    assert rows.total is not None
    return *_shaped(x, rows), rows.total.view(x.shape)


def _silu_mul_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check_same(gate, up, "up")
    return _shaped(gate, _quantize(gate, "silu_mul", other=_rows(up)))


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _token_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    _check(x)
    return _empty(x)


def _asymmetric_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    return *_empty(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.int32)


def _tensor_fake(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    _check(x)
    return _empty(x)[0], x.new_empty((), dtype=torch.float32)


def _rms_norm_fake(x: Tensor, gain: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    _check(x)
    _check_gain(x, gain)
    return _empty(x)


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, gain: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same(x, residual, "residual")
    _check_gain(x, gain)
    return *_empty(x), x.new_empty(x.shape)


def _silu_mul_fake(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    _check_same(gate, up, "up")
    return _empty(gate)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_per_token": (_quantize_per_token, _token_fake),
    "quantize_per_token_asymmetric": (_quantize_per_token_asymmetric, _asymmetric_fake),
    "quantize_per_tensor": (_quantize_per_tensor, _tensor_fake),
    "rms_norm_quantize": (_rms_norm_quantize, _rms_norm_fake),
    "add_rms_norm_quantize": (_add_rms_norm_quantize, _add_rms_norm_fake),
    "silu_mul_quantize": (_silu_mul_quantize, _silu_mul_fake),
}

for _name, (_implementation, _fake) in _IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., K] and its scales fp32 [..., 1]: s = max|x| / 127, q = x / s rounded half to even.

    Args:
        x: [..., K], fp16, bf16 or fp32. An all-zero row has s = 1; a row with NaN or infinity has
            s = NaN or infinity.

    Raises:
        WeightError: for another dtype.
    """
    return torch.ops.qkernels.quantize_per_token(x)


def quantize_per_token_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [..., K], scales fp32 [..., 1] and zero points int32 [..., 1].

    x is about s * (q - zero). The range of a row, which includes 0, is spread over all 256 codes.

    Args:
        x: [..., K], fp16, bf16 or fp32. A row with NaN or infinity has s = NaN.

    Raises:
        WeightError: for another dtype.
    """
    return torch.ops.qkernels.quantize_per_token_asymmetric(x)


def quantize_per_tensor(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 [..., K] and one scale fp32 []: `scale`, or max|x| / 127 where it is None.

    Numbers beyond a given scale's range saturate.

    Raises:
        WeightError: for another dtype of x, or a scale that is not fp32 [].
    """
    return torch.ops.qkernels.quantize_per_tensor(x, scale)


def quantize_activation(x: Tensor) -> QuantizedActivation:
    """`quantize_per_token` for layers that share x, such as the projections to q, k and v.

    They have int8 activations per token; those of other schemes refuse it.
    """
    quantized, scale = quantize_per_token(x)
    return QuantizedActivation(quantized, scale, x.dtype)


def rms_norm_quantize(x: Tensor, gain: Tensor | None, epsilon: float = 1e-6) -> QuantizedActivation:
    """x / sqrt(mean(x^2) + epsilon) * gain, computed in fp32 and quantized per token in one pass.

    Args:
        x: [..., K], fp16, bf16 or fp32.
        gain: [K] of such a type, or None.
    """
    quantized, scale = torch.ops.qkernels.rms_norm_quantize(x, gain, epsilon)
    return QuantizedActivation(quantized, scale, x.dtype)


def add_rms_norm_quantize(
    x: Tensor, residual: Tensor, gain: Tensor | None, epsilon: float = 1e-6
) -> tuple[QuantizedActivation, Tensor]:
    """`rms_norm_quantize` of x + residual, and that sum, rounded to their type."""
    operator = torch.ops.qkernels.add_rms_norm_quantize
    quantized, scale, total = operator(x, residual, gain, epsilon)
    return QuantizedActivation(quantized, scale, x.dtype), total


def silu_mul_quantize(gate: Tensor, up: Tensor) -> QuantizedActivation:
    """silu(gate) * up, computed in fp32 and quantized per token in one pass.

    Args:
        gate, up: [..., K] of one type, fp16, bf16 or fp32.
    """
    quantized, scale = torch.ops.qkernels.silu_mul_quantize(gate, up)
    return QuantizedActivation(quantized, scale, gate.dtype)
