"""onnxruntime (Microsoft): its contrib op MatMulNBits on the CPU, where it is installed.

Two rows, for the op has two ways to compute: with x in fp32, and with x rounded to int8 by blocks
(its `accuracy_level` 4). It takes x and gives y in fp32.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from bench.subjects.base import (
    Buffers,
    Prepared,
    Problem,
    Subject,
    first_reason,
    nibbles,
    no_group_of,
)
from qkernels.weight import QuantizedWeight

_BLOCKS = (16, 32, 64, 128, 256)


def _why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    missing = [name for name in ("onnxruntime", "onnx") if importlib.util.find_spec(name) is None]
    return first_reason(
        (not missing, f"not installed: {', '.join(missing)}"),
        (problem.device == "cpu", "runs on the CPU here"),
        (
            scheme.weight.name == "int4" and scheme.scale_levels == "one" and scheme.weight_only,
            f"runs w4a16-g<N>, not {scheme}",
        ),
    ) or no_group_of(problem, _BLOCKS)


class _Layer:
    """A session of its own, with the buffers that it was last bound to."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._buffers: Buffers | None = None

    def run(self, buffers: Buffers) -> None:
        if self._buffers is not buffers:
            self._bind("x", self._binding.bind_input, buffers.x)
            self._bind("y", self._binding.bind_output, buffers.y)
            self._buffers = buffers
        self._session.run_with_iobinding(self._binding)

    def _bind(self, name: str, bind: Any, tensor: torch.Tensor) -> None:
        array = tensor.numpy()
        bind(name, "cpu", 0, array.dtype.type, array.shape, tensor.data_ptr())


def _model(problem: Problem, weight: QuantizedWeight, accuracy_level: int) -> bytes:
    """y = x @ W.T as an ONNX model with the weight inside."""
    from onnx import TensorProto, helper, numpy_helper

    n, k, group_size = problem.n, problem.k, problem.scheme.group_size
    assert group_size is not None
    blocks = k // group_size
    packed = nibbles(weight.codes).view(n, blocks, group_size // 2)
    tensors = {"codes": packed, "scales": weight.parameters.group_scales().contiguous()}
    if weight.zeros is not None:
        if weight.zeros.dtype is not torch.uint8:
            raise TypeError(f"zero points must be integers, got {weight.zeros.dtype}")
        # Rows of an odd number of blocks end in half a byte.
        tensors["zeros"] = nibbles(torch.nn.functional.pad(weight.zeros, (0, blocks % 2)))
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        N=n,
        K=k,
        bits=4,
        block_size=group_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    # The version of the format, not of onnx: a newer onnx writes one that onnxruntime cannot read.
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


@cache
def _share_one_pool() -> None:
    """One thread pool for all sessions: those of dozens of copies would spin against each other."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(torch.get_num_threads(), 1)


def _layer(model: bytes) -> _Layer:
    import onnxruntime

    _share_one_pool()
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    return _Layer(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))


def _row(accuracy_level: int) -> Subject:
    def prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
        model = _model(problem, weight, accuracy_level)
        return Prepared(
            state=_layer(model),
            run=lambda layer, buffers: layer.run(buffers),
            to_input=lambda x: Buffers.of(x, problem.n),
            to_output=lambda _, buffers: buffers.y,
            copy=lambda _: _layer(model),
            weight_bytes=len(model),
        )

    return Subject(
        f"onnxruntime MatMulNBits level {accuracy_level}",
        _why_not,
        prepare,
        math="int8" if accuracy_level == 4 else "fp32",
        quantizes_x=accuracy_level == 4,
        own_process=True,
    )


ROWS = (_row(0), _row(4))
