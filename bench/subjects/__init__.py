"""The contestants. A new one is a `Subject` row in one of these files, or in one of its own."""

from __future__ import annotations

from bench.subjects import (
    bitsandbytes,
    dense,
    gemlite,
    onnxruntime,
    openvino,
    ours,
    torch_dynamic,
    torch_ops,
)
from bench.subjects.base import Prepared, Problem, Subject

SUBJECTS: tuple[Subject, ...] = (
    *(*dense.ROWS, *ours.ROWS, *torch_ops.ROWS, *torch_dynamic.ROWS),
    *(*gemlite.ROWS, *bitsandbytes.ROWS, *onnxruntime.ROWS, *openvino.ROWS),
)

__all__ = ["SUBJECTS", "Prepared", "Problem", "Subject"]
