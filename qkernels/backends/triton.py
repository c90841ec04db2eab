"""The Triton kernels as rows, on a GPU and, for tests, in Triton's interpreter on the CPU.

Triton is imported at the first call, so that importing qkernels needs none.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qkernels import reference
from qkernels.backends.kernel import Kernel, Problem, Run, WhyNot, kernel_rows, no_gpu
from qkernels.layouts import PLANAR, PackedWeight, plane_height
from qkernels.weight import codebook, nested_table

_GEMV_MOST_ROWS = 4
"""Rows up to which the GEMV runs: it reads the weight once a row, the GEMM once for all of them.
Not measured on a GPU."""

_INVARIANT_ROWS = 64
"""The number of rows whose GEMM config serves every M where results must not depend on M."""

_X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def kernels() -> ModuleType:
    """The launchers of `qkernels.triton_kernels`, imported at the first call."""
    return importlib.import_module("qkernels.triton_kernels")


@lru_cache(maxsize=1)
def import_problem() -> str | None:
    """Why Triton cannot be imported, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import ({error}): pip install triton"
    return None


def interpreter_is_on() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _not_compiled(problem: Problem) -> str | None:
    if problem.device == "cuda" and interpreter_is_on():
        return "TRITON_INTERPRET is set, which keeps Triton from compiling: unset it"
    return no_gpu(problem) or import_problem()


def _no_interpreter(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return "is Triton's interpreter, which runs on the CPU"
    if not interpreter_is_on():
        return "is Triton's interpreter, for tests: set TRITON_INTERPRET=1 before starting Python"
    return import_problem()


def _no_product(problem: Problem) -> str | None:
    if problem.x_dtype not in _X_DTYPES:
        return f"takes x of fp16, bf16 or fp32, not {problem.x_dtype}"
    return None


def _no_float_product(problem: Problem) -> str | None:
    if problem.scheme.integer_activation:
        return "multiplies 16-bit activations, and the scheme has int8 ones"
    return _no_product(problem)


def _no_gemv(problem: Problem) -> str | None:
    if problem.m > _GEMV_MOST_ROWS:
        return f"is for {_GEMV_MOST_ROWS} rows of x at most, got {problem.m}"
    if problem.batch_invariant:
        return "rounds unlike the GEMM, and batch_invariant wants one kernel for every M"
    return _no_float_product(problem)


def _no_int8_gemm(problem: Problem) -> str | None:
    if not problem.scheme.integer_activation:
        return "multiplies int8 activations, and the scheme has none"
    return _no_product(problem)


def planar_weight(packed: PackedWeight) -> Any:
    """`packed`, which is in the planar layout, as the kernels take it."""
    assert packed.layout is PLANAR, f"the weight is in {packed.layout.name}"
    scheme, buffers = packed.scheme, packed.buffers
    device = packed.device
    decode = {"codebook": "codebook", "float8": scheme.weight.name}.get(
        scheme.weight.kind, "signed" if scheme.symmetric else "unsigned"
    )
    nested = None
    if "nested_absmax" in buffers:
        nested = (
            nested_table(device),
            buffers["nested_absmax"],
            buffers["nested_offset"].reshape(1),
        )
    grouped = scheme.groups(packed.k) > 1
    return kernels().PlanarWeight(
        words=buffers["words"],
        scales=buffers["scales"],
        zeros=buffers.get("zeros"),
        n=packed.n,
        k=packed.k,
        bits=scheme.bits,
        plane=plane_height(scheme, packed.k),
        group_size=scheme.group_length(packed.k) if grouped else 0,
        decode=decode,
        codebook=codebook(scheme.weight, device) if scheme.weight.kind == "codebook" else None,
        channel_scales=buffers.get("channel_scales"),
        nested=nested,
    )


def _run_float(launcher: str) -> Run:
    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        weight, out_dtype, x_scale = planar_weight(packed), x.dtype, None
        if not packed.scheme.weight_only:
            x, x_scale = reference.quantize_activations(x, packed, kernels().quantize_rows)
        config = _invariant_config(launcher, weight, problem)
        run_kernel = getattr(kernels(), launcher)
        y: Tensor = run_kernel(x, weight, bias, x_scale=x_scale, out_dtype=out_dtype, config=config)
        return y

    return run


def _run_int8(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    quantized, scale = reference.quantize_activations(x, packed, kernels().quantize_rows)
    return _run_quantized(quantized, scale, packed, bias, problem)


def _run_quantized(
    x: Tensor, scale: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem
) -> Tensor:
    weight = planar_weight(packed)
    config = _invariant_config("int8_gemm", weight, problem)
    y: Tensor = kernels().int8_gemm(
        x, scale, weight, bias, out_dtype=problem.x_dtype, config=config
    )
    return y


def _invariant_config(launcher: str, weight: Any, problem: Problem) -> Any:
    """One config for every M where results must not depend on M; None leaves it to the launcher."""
    if not problem.batch_invariant:
        return None
    chooser = importlib.import_module("qkernels.triton_kernels.config").gemm_config_for
    x_bytes = 1 if problem.scheme.integer_activation else problem.x_dtype.itemsize
    return chooser(launcher, _INVARIANT_ROWS, weight, weight.words.device, x_bytes=x_bytes)


def _rows(backend: str, no_device: WhyNot) -> tuple[Kernel, ...]:
    kernels = {
        "weight_only_gemv": (_no_gemv, _run_float("weight_only_gemv")),
        "weight_only_gemm": (_no_float_product, _run_float("weight_only_gemm")),
        "int8_gemm": (_no_int8_gemm, _run_int8),
    }
    gemv, gemm, int8 = kernel_rows(backend, PLANAR.name, no_device, kernels)
    return gemv, gemm, replace(int8, run_quantized=_run_quantized)


KERNELS = _rows("triton", _not_compiled)
INTERPRETED_KERNELS = _rows("interpreted", _no_interpreter)
