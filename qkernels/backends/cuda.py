"""The CUDA C++ kernels as rows, on a GPU and, for tests, in the emulator on the CPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from qkernels.backends.kernel import Kernel, Problem, RouteOf, WhyNot, kernel_rows, no_gpu, run_by
from qkernels.layouts import FRAGMENT, PackedWeight
from qkernels.layouts.fragment import code_name
from qkernels.layouts.padding import kernel_columns, kernel_group
from qkernels.scheme import QuantScheme
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


def weight_arguments(packed: PackedWeight) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the operators take of a weight: tensors, and what they are."""
    assert packed.layout is FRAGMENT, f"the weight is in {packed.layout.name}"
    scheme, buffers = packed.scheme, packed.buffers
    code = code_name(scheme)
    table = codebook(scheme.weight, packed.device) if code == "table4" else None
    tensors = (buffers["words"], buffers["scales"], buffers.get("zeros"), table)
    columns, group = kernel_columns(scheme, packed.k), kernel_group(scheme, packed.k)
    return tensors, (packed.n, columns, group, code)


@lru_cache(maxsize=1024)
def _route(
    namespace: str,
    scheme: QuantScheme,
    n: int,
    k: int,
    device: torch.device,
    dense: bool,
    schedule_m: int,
) -> Any:
    code = code_name(scheme)
    table = codebook(scheme.weight, device) if code == "table4" else None
    sizes = (n, k, scheme.group_length(k), kernel_group(scheme, k))
    operator = getattr(torch.ops, namespace).weight_only_route
    handle = operator(*sizes, code, table, dense, schedule_m)
    return importlib.import_module("qkernels._C").adopt_route(handle)


def _route_of(namespace: str, dense: bool) -> RouteOf:
    def route(problem: Problem, device: torch.device) -> Any:
        schedule_m = _INVARIANT_ROWS if problem.batch_invariant else 0
        return _route(namespace, problem.scheme, problem.n, problem.k, device, dense, schedule_m)

    return route


def _rows(backend: str, namespace: str, no_device: WhyNot) -> tuple[Kernel, ...]:
    routes = [_route_of(namespace, dense) for dense in (False, True)]
    kernels = {
        "weight_only_mma": (_no_fused_product, run_by(routes[0])),
        "dequantize_matmul": (_no_dense_product, run_by(routes[1])),
    }
    rows = kernel_rows(backend, FRAGMENT.name, no_device, kernels)
    return tuple(replace(row, route=route) for row, route in zip(rows, routes, strict=True))


KERNELS = _rows("cuda", "qkernels_cuda", _not_built_for)
EMULATED_KERNELS = _rows("emulated", "qkernels_emulated", _no_emulator)
