"""vLLM's operators on quantized words, with their names, arguments and results.

The words stay as files store them. At the first call they are packed for this machine's kernels,
and the packed twin is kept for as long as the words are: see `modules/twins.py`. So weights take
twice their memory here; `qkernels.replace_linears` and `load_model` do not need the words.

For inference: without gradients. `torch.compile` takes each as one operator.
Source: vLLM (Apache-2.0), `vllm/_custom_ops.py`, for the signatures.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.checkpoints.held import HeldStore
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import CheckpointError, WeightError
from qkernels.modules import twins
from qkernels.modules.linear import WQLinear

_LAYER = "weight"
_AWQ_BITS = 4


def awq_gemm(
    input: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k_iters: int
) -> Tensor:
    """y [..., N] for x [..., K] and words of AWQ GEMM, in the type of x.

    Args:
        qweight: int32 [K, N/8].
        scales: [K/g, N], fp16, bf16 or fp32.
        qzeros: int32 [K/g, N/8].
        split_k_iters: not used: it is for AutoAWQ's kernels.

    Raises:
        WeightError: for tensors of other shapes or types.
    """
    return torch.ops.qkernels.words_linear(input, [qweight, scales, qzeros], "awq", _AWQ_BITS)


def awq_dequantize(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k_iters: int, thx: int, thy: int
) -> Tensor:
    """The weight [K, N] of words of AWQ GEMM, in the type of the scales.

    The last three arguments are not used.

    Raises:
        WeightError: for tensors of other shapes or types.
    """
    return torch.ops.qkernels.words_dequantize([qweight, scales, qzeros], "awq", _AWQ_BITS)


def gptq_gemm(
    a: Tensor,
    b_q_weight: Tensor,
    b_gptq_qzeros: Tensor,
    b_gptq_scales: Tensor,
    b_g_idx: Tensor | None,
    use_exllama: bool,
    use_v2_format: bool,
    bit: int,
) -> Tensor:
    """y [..., N] for x [..., K] and words of GPTQ, in the type of x.

    Args:
        a: x.
        b_q_weight: int32 [K*b/32, N].
        b_gptq_qzeros: int32 [K/g, N*b/32], the zero points less one, or, with `use_v2_format`, the
            zero points.
        b_gptq_scales: [K/g, N], fp16, bf16 or fp32.
        b_g_idx: int32 [K], the group of each column; None, or without elements, where columns are
            in order.
        use_exllama: must be False: the words of `gptq_shuffle` are not read.
        bit: 2, 3, 4 or 8.

    Raises:
        WeightError: for `use_exllama`, and for tensors of other shapes or types.
    """
    if use_exllama:
        raise WeightError(
            "use_exllama=True is for words that gptq_shuffle has reordered, which are not read: "
            "give the words as they are stored, and use_exllama=False"
        )
    tensors = [b_q_weight, b_gptq_scales, b_gptq_qzeros]
    if b_g_idx is not None and b_g_idx.numel():
        tensors.append(b_g_idx)
    format = "gptq_v2" if use_v2_format else "gptq"
    return torch.ops.qkernels.words_linear(a, tensors, format, bit)


def _section(format: str, bits: int, sorted_columns: bool) -> dict[str, Any]:
    """What a quantization_config would say."""
    if format == "awq":
        return {"quant_method": "awq", "version": "gemm", "bits": bits, "zero_point": True}
    return {
        "quant_method": "gptq",
        "checkpoint_format": format,
        "bits": bits,
        "sym": False,
        "desc_act": sorted_columns,
    }


def _pack(tensors: list[Tensor], format: str, bits: int) -> WQLinear:
    parts = ("qweight", "scales", "qzeros", "g_idx")[: len(tensors)]
    held = {f"{_LAYER}.{part}": tensor for part, tensor in zip(parts, tensors, strict=True)}
    store, row = HeldStore(held, where=format), FORMATS[format]
    config = {"quantization_config": _section(format, bits, "g_idx" in parts)}
    try:
        weight = row.read_layer(store, _LAYER, row.read_plan(config, store)[_LAYER])
    except CheckpointError as error:
        raise WeightError(str(error)) from None
    return WQLinear.from_weight(weight, device=tensors[0].device)


def _twin(tensors: list[Tensor], format: str, bits: int) -> WQLinear:
    make = partial(_pack, tensors, format, bits)
    return twins.of(tensors, make, meaning=(format, bits))


def _linear(x: Tensor, tensors: list[Tensor], format: str, bits: int) -> Tensor:
    layer = _twin(tensors, format, bits)
    if x.dtype not in ops.X_DTYPES or x.shape[-1:] != (layer.in_features,):
        raise WeightError(
            f"x must be [..., {layer.in_features}] of fp16, bf16 or fp32, got {x.dtype} "
            f"{list(x.shape)}"
        )
    y: Tensor = layer(x)
    return y


def _linear_fake(x: Tensor, tensors: list[Tensor], format: str, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], tensors[1].shape[-1]))


def _dequantize(tensors: list[Tensor], format: str, bits: int) -> Tensor:
    values = _twin(tensors, format, bits).dequantize()
    return values.t().to(tensors[1].dtype).contiguous()


def _dequantize_fake(tensors: list[Tensor], format: str, bits: int) -> Tensor:
    words, scales = tensors[:2]
    return scales.new_empty((words.shape[0], scales.shape[-1]))


_library = torch.library.Library("qkernels", "FRAGMENT")
_library.define("words_linear(Tensor x, Tensor[] tensors, str format, int bits) -> Tensor")
_library.define("words_dequantize(Tensor[] tensors, str format, int bits) -> Tensor")
for _key in ("CPU", "CUDA"):
    _library.impl("words_linear", _linear, _key)
    _library.impl("words_dequantize", _dequantize, _key)
torch.library.register_fake("qkernels::words_linear", _linear_fake, lib=_library)
torch.library.register_fake("qkernels::words_dequantize", _dequantize_fake, lib=_library)
