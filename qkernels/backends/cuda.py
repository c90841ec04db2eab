"""The CUDA C++ kernels as rows, on a GPU and, for tests, in the emulator on the CPU."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.backends.kernel import Kernel, Problem, Run, WhyNot, kernel_rows, no_gpu
from qkernels.layouts import FRAGMENT, PackedWeight
from qkernels.layouts.fragment import code_name
from qkernels.layouts.padding import kernel_columns, kernel_group
from qkernels.preparation import pad_groups
from qkernels.weight import codebook

MOST_ROWS = 256
"""Rows up to which the fused kernel runs; more are dequantized and left to cuBLAS, whose
tensor-core instructions are faster on large tiles. Not measured on a GPU."""

_INVARIANT_ROWS = 64
"""The number of rows whose schedule serves every M where results must not depend on M."""

_X_DTYPES = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def build_problem() -> str | None:
    """Why there are no CUDA kernels in this installation, or None."""
    try:
        compiled = importlib.import_module("qkernels._C")
    except ImportError as error:
        return str(error)
    if not compiled.build_info()["cuda"]:
        return (
            "qkernels._C was built without CUDA: install a torch with CUDA and nvcc, then build "
            "again with pip install --no-build-isolation ."
        )
    return None


@lru_cache(maxsize=1)
def built_architectures() -> tuple[str, ...]:
    """The architectures in qkernels._C, such as "8.0" and "9.0a"."""
    return tuple(importlib.import_module("qkernels._C").build_info()["cuda_architectures"])


def missing_architecture(capability: tuple[int, int], built: tuple[str, ...]) -> str | None:
    """Why code for `built` does not run on a GPU of that capability, or None.

    Code for x.y runs on x.z with z >= y, code for x.ya on x.y alone, and PTX ("x.y+PTX") on
    everything newer.
    """
    for name in built:
        number = name.removesuffix("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        exact = number.endswith("a")
        if capability == (major, minor):
            return None
        if not exact and capability[0] == major and capability[1] >= minor:
            return None
        if name.endswith("+PTX") and not exact and capability > (major, minor):
            return None
    wanted = f"{capability[0]}.{capability[1]}"
    return (
        f"this build has code for {', '.join(built)}, and the GPU has capability {wanted}: build "
        f"again with TORCH_CUDA_ARCH_LIST={wanted}"
    )


def emulator_is_loaded() -> bool:
    """Whether the library of emulated kernels was loaded into this process."""
    return hasattr(torch.ops.qkernels_emulated, "weight_only_mma")


def _not_built_for(problem: Problem) -> str | None:
    reason = no_gpu(problem) or build_problem()
    if reason is None and problem.capability is not None:
        reason = missing_architecture(problem.capability, built_architectures())
    return reason


def _no_emulator(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return "is the emulator of the CUDA kernels, which runs on the CPU"
    if not emulator_is_loaded():
        return "is the emulator of the CUDA kernels, for tests: see CONTRIBUTING.md"
    return None


def _no_product(problem: Problem) -> str | None:
    if problem.x_dtype not in _X_DTYPES:
        return f"takes x of fp16 or bf16, not {problem.x_dtype}"
    return FRAGMENT.why_not(problem.scheme)


def _no_fused_product(problem: Problem) -> str | None:
    if problem.m > MOST_ROWS and not problem.batch_invariant:
        return f"is for {MOST_ROWS} rows of x at most, got {problem.m}"
    return _no_product(problem)


def _no_dense_product(problem: Problem) -> str | None:
    if problem.batch_invariant:
        return "multiplies with cuBLAS, which may round a row differently for another M"
    return _no_product(problem)


def aligned_rows(x: Tensor) -> Tensor:
    """x [M, K] as the kernel reads it: K padded to 8 with zeros, rows at multiples of 16 bytes."""
    k = x.shape[1]
    if k % 8:
        return F.pad(x, (0, -k % 8))
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def weight_arguments(packed: PackedWeight) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the operators take of a weight: tensors, and what they are."""
    assert packed.layout is FRAGMENT, f"the weight is in {packed.layout.name}"
    scheme, buffers = packed.scheme, packed.buffers
    code = code_name(scheme)
    table = codebook(scheme.weight, packed.device) if code == "table4" else None
    tensors = (buffers["words"], buffers["scales"], buffers.get("zeros"), table)
    columns, group = kernel_columns(scheme, packed.k), kernel_group(scheme, packed.k)
    return tensors, (packed.n, columns, group, code)


def _run_fused(namespace: str) -> Run:
    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        tensors, facts = weight_arguments(packed)
        schedule_m = _INVARIANT_ROWS if problem.batch_invariant else 0
        operators = getattr(torch.ops, namespace)
        rows = aligned_rows(pad_groups(x, packed.scheme))
        return operators.weight_only_mma(rows, *tensors, bias, *facts, schedule_m)

    return run


def _run_dense(namespace: str) -> Run:
    def run(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
        tensors, facts = weight_arguments(packed)
        weight = getattr(torch.ops, namespace).dequantize(*tensors, *facts, x.dtype)
        return F.linear(
            pad_groups(x, packed.scheme), weight, None if bias is None else bias.to(x.dtype)
        )

    return run


def _rows(backend: str, namespace: str, no_device: WhyNot) -> tuple[Kernel, ...]:
    kernels = {
        "weight_only_mma": (_no_fused_product, _run_fused(namespace)),
        "dequantize_matmul": (_no_dense_product, _run_dense(namespace)),
    }
    return kernel_rows(backend, FRAGMENT.name, no_device, kernels)


KERNELS = _rows("cuda", "qkernels_cuda", _not_built_for)
EMULATED_KERNELS = _rows("emulated", "qkernels_emulated", _no_emulator)
