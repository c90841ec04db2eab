"""The Triton kernels as rows, on a GPU and, for tests, in Triton's interpreter on the CPU.

Triton is imported at the first call, so that importing qkernels needs none.
"""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.backends import beside, cuda
from qkernels.backends.beside import BESIDE, has_beside, run_beside, run_int8_beside
from qkernels.backends.kernel import PREPARED, Kernel, Problem, Run, no_gpu
from qkernels.backends.reference import scale_of_rows
from qkernels.backends.rows import (
    CODES,
    QuantizedRows,
    RowInputs,
    RowKernel,
    RowProblem,
    quantize_activations,
)
from qkernels.layouts import PLANAR, PackedWeight, plane_height
from qkernels.weight import codebook, nested_table

_INVARIANT_ROWS = 64
"""The number of rows whose GEMM config serves every M where results must not depend on M."""


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


def launch_errors() -> tuple[type[Exception], ...]:
    """What compiling and starting a Triton kernel may raise beyond torch's own errors."""
    if "triton" not in sys.modules:
        return ()
    return (importlib.import_module("triton.errors").TritonError,)


def interpreter_is_on() -> bool:
    """Whether this process runs Triton kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _not_compiled(problem: Problem) -> str | None:
    if problem.device == "cuda" and interpreter_is_on():
        return "TRITON_INTERPRET is set, which keeps Triton from compiling: unset it"
    return no_gpu(problem) or import_problem()


def _no_interpreter(problem: Problem) -> str | None:
    return _no_interpreter_on(problem.device)


def _no_interpreter_on(device: str) -> str | None:
    if device != "cpu":
        return "is Triton's interpreter, which runs on the CPU"
    if not interpreter_is_on():
        return "is Triton's interpreter, for tests: set TRITON_INTERPRET=1 before starting Python"
    return import_problem()


class _Held(NamedTuple):
    """A weight as the kernels take it, and what it was made of, which it does not keep alive.

    Attributes:
        meaning: scheme, n and k.
        buffers: each of `_PARTS` that there is, and where its memory was.
    """

    meaning: tuple[Any, ...]
    buffers: tuple[tuple[weakref.ref[Tensor], int], ...]
    weight: Any

    def is_of(self, meaning: tuple[Any, ...], buffers: list[Tensor]) -> bool:
        """Whether these buffers are those that the weight was made of, where they were."""
        return (
            self.meaning == meaning
            and len(self.buffers) == len(buffers)
            and all(
                ref() is buffer and address == buffer.data_ptr()
                for (ref, address), buffer in zip(self.buffers, buffers, strict=True)
            )
        )


_PARTS = ("words", "scales", "zeros", "channel_scales", "nested_absmax", "nested_offset")

_held: dict[int, _Held] = {}
"""By the identity of the words, whose end takes the entry away."""


def planar_weight(packed: PackedWeight) -> Any:
    """`packed`, which is in the planar layout, as the kernels take it.

    Made, and checked, at the first call with these buffers. What is written into them in place is
    seen; of others in their place, a new one is made.
    """
    buffers = [packed.buffers[name] for name in _PARTS if name in packed.buffers]
    meaning = (packed.scheme, packed.n, packed.k)
    key = id(buffers[0])
    held = _held.get(key)
    if held is None or not held.is_of(meaning, buffers):
        refs = [weakref.ref(buffer) for buffer in buffers[1:]]
        # An alias: the table must not keep alive the words that take the entry out of it.
        words = buffers[0].detach()
        weight = _new_planar_weight(replace(packed, buffers=packed.buffers | {"words": words}))
        refs.insert(0, weakref.ref(buffers[0], lambda _: _held.pop(key, None)))
        addresses = (buffer.data_ptr() for buffer in buffers)
        _held[key] = held = _Held(meaning, tuple(zip(refs, addresses, strict=True)), weight)
    return held.weight


def _new_planar_weight(packed: PackedWeight) -> Any:
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
            x, x_scale = quantize_activations(x, packed)
        config = _invariant_config(launcher, weight, problem)
        run_kernel = getattr(kernels(), launcher)
        y: Tensor = run_kernel(x, weight, bias, x_scale=x_scale, out_dtype=out_dtype, config=config)
        return y

    return run


def _run_int8(x: Tensor, packed: PackedWeight, bias: Tensor | None, problem: Problem) -> Tensor:
    quantized, scale = quantize_activations(x, packed)
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


_SMALLEST_GROUP = 16


def _why_not_groups(problem: Problem) -> str | None:
    scheme, k = problem.scheme, problem.k
    if scheme.groups(k) == 1 or scheme.group_length(k) >= _SMALLEST_GROUP:
        return None
    return f"takes groups of {_SMALLEST_GROUP} columns and more, not of {scheme.group_length(k)}"


_VARIES = "rounds unlike the GEMM, and batch_invariant wants one kernel for every M"


def _of_codes() -> tuple[Kernel, ...]:
    return KERNELS[:_OF_CODES]


def _of_codes_interpreted() -> tuple[Kernel, ...]:
    return INTERPRETED_KERNELS[:_OF_CODES]


_OF_CODES = 3
"""Kernels before those that call one of them."""


def _add_beside(
    y: Tensor, x: Tensor, packed: PackedWeight, dtype: torch.dtype, scale: Tensor | None
) -> Tensor:
    """By the CUDA kernel where there is one for this GPU."""
    if cuda.not_built(torch.cuda.get_device_capability(y.device)) is not None:
        return beside.add(y, x, packed, dtype, scale)
    return beside.add_by_kernel("qkernels_cuda")(y, x, packed, dtype, scale)


def _has_beside(problem: Problem) -> str | None:
    return has_beside(problem) or _why_not_groups(problem)


# The GEMV reads the weight once a row, the GEMM once for all of them: where the one is faster was
# not measured on a GPU.
KERNELS = (
    Kernel(
        name="triton_weight_only_gemv",
        backend="triton",
        layout="planar",
        activations=("none", "fp8"),
        most_rows=4,
        varies=_VARIES,
        where=_not_compiled,
        why_not=_why_not_groups,
        run=_run_float("weight_only_gemv"),
    ),
    Kernel(
        name="triton_weight_only_gemm",
        backend="triton",
        layout="planar",
        activations=("none", "fp8"),
        where=_not_compiled,
        why_not=_why_not_groups,
        run=_run_float("weight_only_gemm"),
    ),
    Kernel(
        name="triton_int8_gemm",
        backend="triton",
        layout="planar",
        activations=("int8", "int4"),
        weight_rounding="integers",
        where=_not_compiled,
        why_not=_why_not_groups,
        run=_run_int8,
        run_quantized=_run_quantized,
    ),
    Kernel(
        name="triton_float_beside",
        backend="triton",
        layout="planar",
        activations=("none",),
        fields=PREPARED | BESIDE,
        varies=_VARIES,
        where=_not_compiled,
        why_not=_has_beside,
        run=run_beside(_of_codes, _add_beside),
    ),
    Kernel(
        name="triton_int8_beside",
        backend="triton",
        layout="planar",
        activations=("int8", "int4"),
        fields=PREPARED | BESIDE,
        varies=_VARIES,
        weight_rounding="integers",
        where=_not_compiled,
        why_not=_has_beside,
        **run_int8_beside(_of_codes, _add_beside),
    ),
)
_GEMV, _GEMM, _INT8, _BESIDE, _INT8_BESIDE = KERNELS
INTERPRETED_KERNELS = (
    replace(
        _GEMV,
        name="interpreted_weight_only_gemv",
        backend="interpreted",
        is_simulator=True,
        proves_itself=False,
        where=_no_interpreter,
    ),
    replace(
        _GEMM,
        name="interpreted_weight_only_gemm",
        backend="interpreted",
        is_simulator=True,
        proves_itself=False,
        where=_no_interpreter,
    ),
    replace(
        _INT8,
        name="interpreted_int8_gemm",
        backend="interpreted",
        is_simulator=True,
        proves_itself=False,
        where=_no_interpreter,
    ),
    replace(
        _BESIDE,
        name="interpreted_float_beside",
        backend="interpreted",
        is_simulator=True,
        proves_itself=False,
        where=_no_interpreter,
        run=run_beside(_of_codes_interpreted),
    ),
    replace(
        _INT8_BESIDE,
        name="interpreted_int8_beside",
        backend="interpreted",
        is_simulator=True,
        proves_itself=False,
        where=_no_interpreter,
        **run_int8_beside(_of_codes_interpreted),
    ),
)


def _where_rows(problem: RowProblem) -> str | None:
    if problem.device != "cuda":
        return f"needs a CUDA GPU, and x is on {problem.device}"
    return _why_not_rows(problem) or import_problem()


def _where_rows_interpreted(problem: RowProblem) -> str | None:
    return _why_not_rows(problem) or _no_interpreter_on(problem.device)


def _why_not_rows(problem: RowProblem) -> str | None:
    if problem.scale_of == "tensor" and problem.kind != "plain":
        return f"takes the scale of a tensor for plain rows, not for {problem.kind}"
    return None


def _run_rows(problem: RowProblem, inputs: RowInputs) -> QuantizedRows:
    given = scale_of_rows(problem, inputs.x, inputs)
    rows = kernels().quantize_rows_of(
        *(inputs.x, problem.kind, problem.codes),
        other=inputs.other,
        gain=inputs.gain,
        bias=inputs.bias,
        epsilon=inputs.epsilon,
        scale=given,
        has_zeros=problem.scale_of == "asymmetric",
        rounds=problem.rounds,
    )
    scale = rows.scales
    if problem.scale_of == "tensor":
        assert given is not None
        scale = given
    return QuantizedRows(
        values=rows.codes, scale=scale, zero=rows.zeros, total=rows.total, rounded=rows.rounded
    )


ROW_KERNELS = (
    RowKernel(
        name="triton_quantize_rows",
        backend="triton",
        codes=CODES,
        where=_where_rows,
        run=_run_rows,
    ),
)
INTERPRETED_ROW_KERNELS = (
    replace(
        ROW_KERNELS[0],
        name="interpreted_quantize_rows",
        backend="interpreted",
        where=_where_rows_interpreted,
    ),
)
