"""Peers that come with torch: its int4 and int8 weight-only ops, its int8 and float8 products."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.subjects.base import Prepared, Problem, Subject, first_reason, no_group_of
from qkernels.scheme import Activation, QuantScheme
from qkernels.weight import QuantizedWeight

_GROUPS = (32, 64, 128, 256)
_INNER_K_TILES = 8


def _has(op: str) -> bool:
    return hasattr(torch.ops.aten, op)


def _is_linear(scheme: QuantScheme, bits: int) -> bool:
    return scheme.weight.name == f"int{bits}" and scheme.scale_levels == "one"


def _scales_and_offsets(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """[G, N, 2] with scale s and offset (8 - zero) * s: torch reads W = (code - 8) * s + offset."""
    scales = weight.parameters.group_scales()
    zeros = weight.parameters.group_zeros()
    offsets = torch.zeros_like(scales) if zeros is None else (8 - zeros) * scales
    return torch.stack([scales.T, offsets.T], dim=-1).contiguous().to(dtype)


def _int4_why_not(problem: Problem, op: str) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (_has(op), f"this torch has no {op}"),
        (_is_linear(scheme, 4) and scheme.weight_only, f"runs w4a16-g<N>, not {scheme}"),
    ) or no_group_of(problem, _GROUPS)


def _int4_cuda_why_not(problem: Problem) -> str | None:
    tile = _INNER_K_TILES * 16
    return first_reason(
        (problem.device == "cuda", "runs on CUDA only"),
        (problem.dtype is torch.bfloat16, f"takes bf16, not {problem.dtype}"),
        (problem.n % 8 == 0, f"N={problem.n} is not a multiple of 8"),
        (problem.k % tile == 0, f"K={problem.k} is not a multiple of {tile}"),
    ) or _int4_why_not(problem, "_weight_int4pack_mm")


def _int4_cuda(problem: Problem, weight: QuantizedWeight) -> Prepared:
    pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
    group_size = problem.scheme.group_size
    return Prepared(
        state=(packed, _scales_and_offsets(weight, problem.dtype)),
        run=lambda state, x: torch.ops.aten._weight_int4pack_mm(x, state[0], group_size, state[1]),
    )


def _int4_cpu_why_not(problem: Problem) -> str | None:
    return first_reason(
        (problem.device == "cpu", "runs on the CPU only"),
        (problem.n % 16 == 0, f"N={problem.n} is not a multiple of 16"),
    ) or _int4_why_not(problem, "_weight_int4pack_mm_for_cpu")


def _int4_cpu(problem: Problem, weight: QuantizedWeight) -> Prepared:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1)
    group_size = problem.scheme.group_size
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Prepared(
        state=(packed, _scales_and_offsets(weight, problem.dtype)),
        run=lambda state, x: op(x, state[0], group_size, state[1]),
    )


def _is_per_channel_int8(scheme: QuantScheme) -> bool:
    per_channel = scheme.group_size is None and not scheme.per_tensor
    return _is_linear(scheme, 8) and scheme.symmetric and per_channel


def _int8_weights(weight: QuantizedWeight) -> Tensor:
    return (weight.codes.short() - 128).to(torch.int8)


def _int8pack_why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (_has("_weight_int8pack_mm"), "this torch has no _weight_int8pack_mm"),
        (
            _is_per_channel_int8(scheme) and scheme.weight_only,
            f"runs w8a16-sym per channel, not {scheme}",
        ),
        (
            problem.device == "cpu" or problem.dtype is torch.bfloat16,
            f"takes bf16 on CUDA, not {problem.dtype}",
        ),
    )


def _int8pack(problem: Problem, weight: QuantizedWeight) -> Prepared:
    scales = weight.scales[:, 0].to(problem.dtype)
    return Prepared(
        state=(_int8_weights(weight), scales),
        run=lambda state, x: torch.ops.aten._weight_int8pack_mm(x, state[0], state[1]),
    )


def _int_mm_why_not(problem: Problem) -> str | None:
    scheme, on_cpu = problem.scheme, problem.device == "cpu"
    dynamic_int8 = scheme.activation == Activation("int8")
    return first_reason(
        (_has("_int_mm"), "this torch has no _int_mm"),
        (_is_per_channel_int8(scheme) and dynamic_int8, f"runs w8a8, not {scheme}"),
        (on_cpu or problem.m > 16, f"needs M > 16 on CUDA, got M={problem.m}"),
        (
            on_cpu or (problem.n % 8 == 0 and problem.k % 8 == 0),
            f"needs N and K in multiples of 8 on CUDA, got N={problem.n}, K={problem.k}",
        ),
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row in plain torch: int8 [M, K] and fp32 scales [M, 1]."""
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return (wide / scales).round().to(torch.int8), scales


def _scaled(product: Tensor, row_scales: Tensor, channel_scales: Tensor) -> Tensor:
    return product.float() * row_scales * channel_scales


def _int_mm_whole(problem: Problem, weight: QuantizedWeight) -> Prepared:
    def run(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        x_int8, row_scales = quantize_rows(x)
        product = torch.ops.aten._int_mm(x_int8, state[0].t())
        return _scaled(product, row_scales, state[1]).to(problem.dtype)

    return Prepared(state=(_int8_weights(weight), weight.scales[:, 0].float()), run=run)


def _int_mm_alone(problem: Problem, weight: QuantizedWeight) -> Prepared:
    channel_scales = weight.scales[:, 0].float()
    return Prepared(
        state=_int8_weights(weight),
        run=lambda w, x: torch.ops.aten._int_mm(x[0], w.t()),
        to_input=quantize_rows,
        to_output=lambda product, x: _scaled(product, x[1], channel_scales),
    )


def _scaled_mm_why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (_has("_scaled_mm"), "this torch has no _scaled_mm"),
        (problem.device == "cuda", "needs a CUDA device"),
        (
            scheme == QuantScheme.parse("fp8-a8"),
            f"runs fp8-a8, with a scale for each row of x and of W, not {scheme}",
        ),
        (problem.dtype is torch.bfloat16, f"gives bf16, not {problem.dtype}"),
        (
            problem.n % 16 == 0 and problem.k % 16 == 0,
            f"needs N and K in multiples of 16, got N={problem.n}, K={problem.k}",
        ),
        (
            torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0),
            "takes scales of rows from compute capability 9.0 on",
        ),
    )


def _float8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 per row in plain torch: float8 [M, K] and fp32 scales [M, 1]."""
    wide = x.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448
    return (wide / scales).to(torch.float8_e4m3fn), scales


def _scaled_mm(problem: Problem, weight: QuantizedWeight) -> Prepared:
    def run(state: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        rows, row_scales = _float8_rows(x)
        return torch._scaled_mm(
            *(rows, state[0].t(), row_scales, state[1]),
            out_dtype=problem.dtype,
            use_fast_accum=True,
        )

    codes = weight.codes.contiguous().view(torch.float8_e4m3fn)
    return Prepared(state=(codes, weight.scales.float().view(1, -1).contiguous()), run=run)


ROWS = (
    Subject("torch _weight_int4pack_mm", _int4_cuda_why_not, _int4_cuda),
    Subject("torch _weight_int4pack_mm_for_cpu", _int4_cpu_why_not, _int4_cpu),
    Subject("torch _weight_int8pack_mm", _int8pack_why_not, _int8pack),
    Subject("torch _int_mm + quantize x", _int_mm_why_not, _int_mm_whole),
    Subject("torch _int_mm, product alone", _int_mm_why_not, _int_mm_alone),
    Subject("torch _scaled_mm + quantize x", _scaled_mm_why_not, _scaled_mm),
)
