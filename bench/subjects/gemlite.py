"""gemlite (Mobius Labs): Triton kernels for low-bit weights, where it is installed."""

from __future__ import annotations

import importlib.util

import torch

from bench.subjects.base import Prepared, Problem, Subject, first_reason
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight


def _not_here(problem: Problem) -> str | None:
    return first_reason(
        (importlib.util.find_spec("gemlite") is not None, "the package gemlite is not installed"),
        (problem.device == "cuda", "needs a CUDA device"),
        (problem.dtype in (torch.float16, torch.bfloat16), f"takes 16 bits, not {problem.dtype}"),
        (
            problem.n % 32 == 0 and problem.k % 32 == 0,
            f"needs N and K in multiples of 32, got N={problem.n}, K={problem.k}",
        ),
    )


def _why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return _not_here(problem) or first_reason(
        (
            scheme.weight.kind == "linear" and scheme.bits in (2, 4, 8) and scheme.weight_only,
            f"runs w2a16, w4a16 and w8a16, not {scheme}",
        ),
        (scheme.scale_levels == "one" and not scheme.per_tensor, f"has no scales like {scheme}"),
        (
            problem.k % scheme.group_length(problem.k) == 0,
            f"K={problem.k} is not a multiple of the group size {scheme.group_size}",
        ),
    )


def _prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
    from gemlite.helper import A16Wn

    scales = weight.parameters.group_scales()
    zeros = weight.parameters.group_zeros()
    if zeros is None:
        zeros = torch.full_like(scales, problem.scheme.implied_zero)
    layer = A16Wn(device=str(weight.codes.device)).from_weights(
        weight.codes,
        scales.to(problem.dtype),
        zeros.to(problem.dtype),
        problem.scheme.bits,
        problem.scheme.group_length(problem.k),
    )
    return Prepared(state=layer, run=lambda module, x: module(x))


def _int8_why_not(problem: Problem) -> str | None:
    is_w8a8 = problem.scheme == QuantScheme.parse("w8a8")
    return _not_here(problem) or first_reason((is_w8a8, f"runs w8a8, not {problem.scheme}"))


def _prepare_int8(problem: Problem, weight: QuantizedWeight) -> Prepared:
    from gemlite.helper import A8W8_int8_dynamic

    make = A8W8_int8_dynamic(device=str(weight.codes.device), dtype=problem.dtype)
    integers = (weight.codes ^ 128).view(torch.int8)  # code - 128
    layer = make.from_weights(integers, scales=weight.scales.float())
    return Prepared(state=layer, run=lambda module, x: module(x))


ROWS = (
    Subject("gemlite", _why_not, _prepare),
    Subject("gemlite A8W8", _int8_why_not, _prepare_int8),
)
