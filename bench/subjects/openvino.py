"""OpenVINO (Intel): a product with 4-bit weights on the CPU, where it is installed.

The weight is what its own compressor writes: u4 codes, less zero points, times scales, by groups.
The CPU plugin keeps such a weight in 4 bits. It takes x and gives y in fp32 here; the rows differ
in how it may compute between: in fp32, with x rounded to int8 by blocks, or in bf16.
"""

from __future__ import annotations

import importlib.util
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

_GROUPS = (32, 64, 128, 256)


def _why_not(problem: Problem) -> str | None:
    scheme = problem.scheme
    return first_reason(
        (importlib.util.find_spec("openvino") is not None, "the package openvino is not installed"),
        (problem.device == "cpu", "runs on the CPU here"),
        (
            scheme.weight.name == "int4" and scheme.scale_levels == "one" and scheme.weight_only,
            f"runs w4a16-g<N>, not {scheme}",
        ),
    ) or no_group_of(problem, _GROUPS)


class _Layer:
    """A compiled model of its own, with the buffers that it was last bound to."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._buffers: Buffers | None = None

    def run(self, buffers: Buffers) -> None:
        if self._buffers is not buffers:
            import openvino

            shared = [
                openvino.Tensor(t.numpy(), shared_memory=True) for t in (buffers.x, buffers.y)
            ]
            self._request.set_input_tensor(shared[0])
            self._request.set_output_tensor(shared[1])
            self._buffers = buffers
        self._request.infer()


def _packed(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N * K / 2], zero points [ceil(N * G / 2)] and fp16 scales [N, G, 1]."""
    zeros = weight.zeros
    if zeros is None:
        shape = weight.scales.shape
        zeros = torch.full(shape, weight.scheme.symmetric_zero, dtype=torch.uint8)
    elif zeros.dtype is not torch.uint8:
        raise TypeError(f"zero points must be integers, got {zeros.dtype}")
    flat = zeros.flatten()
    flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
    scales = weight.parameters.group_scales().half().unsqueeze(-1).contiguous()
    return nibbles(weight.codes.flatten()), nibbles(flat), scales


def _layer(problem: Problem, tensors: tuple[torch.Tensor, ...], hints: dict[str, Any]) -> _Layer:
    import openvino
    from openvino import opset13 as ops

    n, k, group_size = problem.n, problem.k, problem.scheme.group_size
    assert group_size is not None
    codes, zeros, scales = tensors

    def four_bits(packed: torch.Tensor, shape: list[int]) -> Any:
        # Memory of its own, for a constant keeps reading the tensor that it is made of.
        tensor = openvino.Tensor(openvino.Type.u4, openvino.Shape(shape))
        tensor.data[...] = packed.numpy().reshape(tensor.data.shape)
        return ops.convert(ops.constant(tensor), "f16")

    groups = k // group_size
    x = ops.parameter([-1, k], openvino.Type.f32, name="x")
    shifted = ops.subtract(
        four_bits(codes, [n, groups, group_size]), four_bits(zeros, [n, groups, 1])
    )
    scaled = ops.multiply(shifted, ops.constant(scales.numpy()))
    dense = ops.convert(ops.reshape(scaled, [n, k], special_zero=False), "f32")
    y = ops.matmul(x, dense, transpose_a=False, transpose_b=True)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        **hints,
    }
    model = openvino.Model([y], [x], "linear")
    return _Layer(openvino.compile_model(model, "CPU", settings))


def _row(name: str, math: str, *, precision: str = "f32", x_group: int = 0) -> Subject:
    """`x_group` is the length of the blocks in which x is rounded to int8; 0 for none."""

    def prepare(problem: Problem, weight: QuantizedWeight) -> Prepared:
        tensors = _packed(weight)
        hints = {
            "INFERENCE_PRECISION_HINT": precision,
            # Blocks longer than the weight's groups would be ignored, and x left as it is.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(x_group, problem.scheme.group_length(problem.k)),
        }
        return Prepared(
            state=_layer(problem, tensors, hints),
            run=lambda layer, buffers: layer.run(buffers),
            to_input=lambda x: Buffers.of(x, problem.n),
            to_output=lambda _, buffers: buffers.y,
            copy=lambda _: _layer(problem, tensors, hints),
            weight_bytes=sum(tensor.nbytes for tensor in tensors),
        )

    return Subject(
        name,
        _why_not,
        prepare,
        math=math,
        quantizes_x=x_group > 0,
        own_process=True,
    )


ROWS = (
    _row("openvino u4", "fp32"),
    _row("openvino u4, x in int8", "int8", x_group=128),
    _row("openvino u4, in bf16", "half", precision="bf16"),
)
