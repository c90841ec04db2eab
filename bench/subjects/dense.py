"""The baselines: torch's dense product with the dequantized weight, in 16 and in 32 bits."""

from __future__ import annotations

import torch

from bench.subjects.base import Prepared, Problem, Subject
from qkernels.weight import QuantizedWeight

DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPE_NAMES.items() if value is dtype)


def baseline_name(dtype: torch.dtype) -> str:
    """The dense row that ratios are taken to: the one in the dtype of x."""
    return f"torch dense {dtype_name(dtype)}"


def _row(name: str, dtype: torch.dtype) -> Subject:
    def why_not(problem: Problem) -> str | None:
        if dtype not in (problem.dtype, torch.bfloat16, torch.float32):
            return f"shown with --dtype {name} only"
        if dtype is torch.float32 and problem.device == "cuda":
            return "not shown on CUDA, where 16 bits are the baseline"
        return None

    def prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
        return Prepared(
            state=weight.dequantize().to(dtype),
            run=lambda w, x: torch.nn.functional.linear(x, w),
            to_input=lambda x: x.to(dtype),
        )

    math = "fp32" if dtype is torch.float32 else "half"
    return Subject(f"torch dense {name}", why_not, prepare, math=math, dense=True)


ROWS = tuple(_row(name, dtype) for name, dtype in DTYPE_NAMES.items())
