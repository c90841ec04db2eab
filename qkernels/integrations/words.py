"""Operators on words of other packages' layouts: a product, its gradient, and the dense weight.

    words_linear(x, tensors, bias, spec) -> y       words_linear_grad_input(grad, tensors, spec)
    words_dequantize(tensors, spec) -> the weight   `spec` is a `Words`, as a string

The words stay as they are stored. At the first call they are packed for this machine's kernels, and
the packed twin is kept for as long as the words are: see `modules/twins.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from qkernels import ops
from qkernels.bits import marlin_scales, marlin_zeros, unpack_marlin
from qkernels.checkpoints.held import HeldStore
from qkernels.checkpoints.table import FORMATS
from qkernels.errors import CheckpointError, WeightError
from qkernels.modules import twins
from qkernels.modules.linear import WQLinear
from qkernels.scheme import WEIGHT_TYPES, QuantScheme
from qkernels.weight import QuantizedWeight

_LAYER = "weight"


@dataclass(frozen=True)
class Words:
    """What a list of tensors is, as one hashable value that spells itself as a string.

    Attributes:
        format: a row of `FORMATS`, or "marlin" for vLLM's words of Marlin.
        bits: of a code.
        n, k: the weight is [n, k].
        group: columns that share a scale; 0 where the number of scales says it.
        parts: the names of the tensors, the words first.
    """

    format: str
    bits: int
    n: int
    k: int
    group: int
    parts: tuple[str, ...]

    def __str__(self) -> str:
        numbers = f"{self.bits}|{self.n}|{self.k}|{self.group}"
        return f"{self.format}|{numbers}|{','.join(self.parts)}"

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Words:
        format, bits, n, k, group, parts = text.split("|")
        return Words(format, int(bits), int(n), int(k), int(group), tuple(parts.split(",")))


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor | None],
    bias: Tensor | None,
    *,
    format: str,
    bits: int,
    n: int,
    k: int,
    group: int = 0,
) -> Tensor:
    """y [..., N] for x [..., K], in the type of x (autocast's under it).

    Args:
        tensors: by the names that the format has for them, the words first; None for what is
            missing.
        bias: [N] or None.

    Raises:
        WeightError: for tensors of other shapes or types, or an x that does not fit them.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    words = Words(format, bits, n, k, group, tuple(present))
    return torch.ops.qkernels.words_linear(x, list(present.values()), bias, str(words))


def dequantize(
    tensors: Mapping[str, Tensor], *, format: str, bits: int, n: int, k: int, group: int = 0
) -> Tensor:
    """The weight [N, K] in fp32; see `linear`."""
    words = Words(format, bits, n, k, group, tuple(tensors))
    return torch.ops.qkernels.words_dequantize(list(tensors.values()), str(words))


def check(
    tensors: Mapping[str, Tensor], *, format: str, bits: int, n: int, k: int, group: int = 0
) -> None:
    """Packs tensors ahead of their first product; raises what `linear` would."""
    twin(list(tensors.values()), Words(format, bits, n, k, group, tuple(tensors)))


def _section(words: Words, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a quantization_config would say."""
    group, index = words.group, tensors.get("g_idx")
    if not group and index is not None and index.numel():
        group = int(index.unique(return_counts=True)[1].max())
    said: dict[str, Any] = {"bits": words.bits}
    if group:
        said["group_size"] = -1 if group >= words.k else group
    if words.format.startswith("gptq"):
        said |= {
            "quant_method": "gptq",
            "checkpoint_format": words.format,
            "sym": False,
            "desc_act": index is not None,
        }
    else:
        version = words.format.replace("awq-", "").replace("-", "_").replace("awq", "gemm")
        said |= {"quant_method": "awq", "version": version, "zero_point": True}
    return said


def _read(words: Words, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """A weight by the reader of its format."""
    held = {f"{_LAYER}.{name}": tensor for name, tensor in tensors.items()}
    store, row = HeldStore(held, where=words.format), FORMATS[words.format]
    config = {"quantization_config": _section(words, tensors)}
    try:
        weight = row.read_layer(store, _LAYER, row.read_plan(config, store)[_LAYER])
    except CheckpointError as error:
        raise WeightError(str(error)) from None
    if weight.shape != (words.n, words.k):
        raise WeightError(
            f"{words.format} words are a weight {list(weight.shape)}, where "
            f"{[words.n, words.k]} was expected"
        )
    return weight


def _read_marlin(words: Words, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    stored, zeros, perm = tensors["scales"], tensors.get("qzeros"), tensors.get("perm")
    n, k, bits, groups = words.n, words.k, words.bits, stored.shape[0]
    expected = {
        "words": ((k // 16, n * bits // 2), torch.int32),
        "scales": ((groups, n), stored.dtype),
        "qzeros": ((groups, n * bits // 32), torch.int32),
        "perm": ((k,), None),
    }
    for name, tensor in tensors.items():
        shape, dtype = expected[name]
        if tuple(tensor.shape) != shape or dtype not in (None, tensor.dtype):
            raise WeightError(
                f"Marlin {name} of a weight {[n, k]} must be {dtype} {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
    if groups < 1 or k % groups:
        raise WeightError(f"Marlin scales for {groups} groups do not fit {k} columns")
    scheme = QuantScheme(
        weight=WEIGHT_TYPES[f"int{bits}"],
        group_size=None if groups == 1 else k // groups,
        symmetric=zeros is None,
        scale_dtype=stored.dtype,
    )
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_marlin(tensors["words"], bits),
        scales=marlin_scales(stored),
        zeros=None if zeros is None else marlin_zeros(zeros, bits),
        perm=None if perm is None else perm.long(),
    )


def _pack(words: Words, tensors: list[Tensor]) -> WQLinear:
    named = dict(zip(words.parts, tensors, strict=True))
    read = _read_marlin if words.format == "marlin" else _read
    return WQLinear.from_weight(read(words, named), device=tensors[0].device)


def twin(tensors: list[Tensor], words: Words) -> WQLinear:
    """The packed twin of the tensors, without a bias.

    Raises:
        WeightError: for tensors of other shapes or types.
    """
    return twins.of(tensors, partial(_pack, words, tensors), meaning=words)


def _linear(x: Tensor, tensors: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    words = Words.parse(spec)
    ops.check_input(x, words.k, "x", tensors[0])
    return twin(tensors, words).view_product(x, bias)


def _linear_fake(x: Tensor, tensors: list[Tensor], bias: Tensor | None, spec: str) -> Tensor:
    words = Words.parse(spec)
    ops.check_input(x, words.k, "x", tensors[0])
    return x.new_empty((*x.shape[:-1], words.n))


def _grad_input(grad: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    packed = twin(tensors, Words.parse(spec)).packed
    buffers, about = list(packed.buffers.values()), str(ops.PackedSpec.of(packed))
    return torch.ops.qkernels.linear_grad_input(grad, buffers, about)


def _grad_input_fake(grad: Tensor, tensors: list[Tensor], spec: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], Words.parse(spec).k))


def _dequantize(tensors: list[Tensor], spec: str) -> Tensor:
    return twin(tensors, Words.parse(spec)).dequantize()


def _dequantize_fake(tensors: list[Tensor], spec: str) -> Tensor:
    words = Words.parse(spec)
    return torch.empty(words.n, words.k, dtype=torch.float32, device=tensors[0].device)


def _save(ctx: Any, inputs: Any, output: Tensor) -> None:
    # Not as variables, which inference tensors cannot be.
    _, ctx.tensors, bias, ctx.spec = inputs
    ctx.bias_type = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, list[None], Tensor | None, None]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qkernels.words_linear_grad_input(grad, ctx.tensors, ctx.spec)
    if ctx.needs_input_grad[2]:
        rows = grad.reshape(-1, grad.shape[-1])
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_type)
    return grad_x, [None] * len(ctx.tensors), grad_bias, None


_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "words_linear": (
        "(Tensor x, Tensor[] tensors, Tensor? bias, str spec) -> Tensor",
        _linear,
        _linear_fake,
    ),
    "words_linear_grad_input": (
        "(Tensor grad, Tensor[] tensors, str spec) -> Tensor",
        _grad_input,
        _grad_input_fake,
    ),
    "words_dequantize": (
        "(Tensor[] tensors, str spec) -> Tensor",
        _dequantize,
        _dequantize_fake,
    ),
}
_library = torch.library.Library("qkernels", "FRAGMENT")
for _name, (_schema, _implementation, _fake) in _OPERATORS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"qkernels::{_name}", _fake, lib=_library)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("words_linear", ops.under_autocast(torch.ops.qkernels.words_linear.default), _key)
torch.library.register_autograd(
    "qkernels::words_linear", _backward, setup_context=_save, lib=_library
)
