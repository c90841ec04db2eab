"""vLLM's operators on quantized words, with their names, arguments and results.

The words stay as files store them, and packed twins are kept beside them: see
`integrations/words.py`. So weights take twice their memory here; `qkernels.replace_linears` and
`load_model` do not need the words.

Gradients go to x alone, and to a bias. `torch.compile` takes each product as one operator, and
autocast has it compute in its type.
Source: vLLM (Apache-2.0), `vllm/_custom_ops.py` and `vllm/scalar_type.py`, for the signatures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkernels.bits import marlin_bias, pack_marlin, unpack_awq, unpack_gptq
from qkernels.errors import WeightError
from qkernels.integrations import words

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
    _check_two_dimensions(qweight=qweight, scales=scales)
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    n, k = scales.shape[-1], len(qweight)
    return words.linear(input, tensors, None, format="awq", bits=_AWQ_BITS, n=n, k=k)


def awq_dequantize(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k_iters: int, thx: int, thy: int
) -> Tensor:
    """The weight [K, N] of words of AWQ GEMM, in the type of the scales.

    The last three arguments are not used.

    Raises:
        WeightError: for tensors of other shapes or types.
    """
    _check_two_dimensions(qweight=qweight, scales=scales)
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    n, k = scales.shape[-1], len(qweight)
    weight = words.dequantize(tensors, format="awq", bits=_AWQ_BITS, n=n, k=k)
    return weight.t().to(scales.dtype).contiguous()


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
    if bit not in (2, 3, 4, 8):
        raise WeightError(f"GPTQ words of {bit} bits are not supported: 2, 3, 4 and 8 are")
    _check_two_dimensions(b_q_weight=b_q_weight, b_gptq_scales=b_gptq_scales)
    tensors = {
        "qweight": b_q_weight,
        "scales": b_gptq_scales,
        "qzeros": b_gptq_qzeros,
        "g_idx": b_g_idx if b_g_idx is not None and b_g_idx.numel() else None,
    }
    n, k = b_gptq_scales.shape[-1], 32 * len(b_q_weight) // bit
    format = "gptq_v2" if use_v2_format else "gptq"
    return words.linear(a, tensors, None, format=format, bits=bit, n=n, k=k)


def marlin_gemm(
    a: Tensor,
    c: Tensor | None,
    b_q_weight: Tensor,
    b_bias: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros: Tensor | None,
    workspace: Tensor | None,
    b_q_type: Any,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool = False,
    use_fp32_reduce: bool = False,
    is_zp_float: bool = False,
) -> Tensor:
    """y [..., N] for x [..., K] and words of Marlin, in the type of x.

    Args:
        a: x.
        c: y is written to it where it is given.
        b_q_weight: int32 [K/16, N*b/2], what `gptq_marlin_repack` and `awq_marlin_repack` make.
        b_bias: [N], in the order of columns that vLLM's marlin_permute_bias puts it in.
        b_scales: [K/g, N], in that of marlin_permute_scales.
        b_zeros: int32 [K/g, N*b/32], as awq_to_marlin_zero_points has them; None, or without
            elements, for the types with a bias.
        b_q_type: uint4b8 or uint8b128, which are symmetric, or uint4 or uint8, with zero points: a
            ScalarType of vLLM, its id, or its name.
        size_m, size_n, size_k: M, N and K.
        a_scales, global_scale, is_zp_float: must be None and False: they are for other types.
        workspace, use_atomic_add, use_fp32_reduce: not used; sums are always in fp32.

    Raises:
        WeightError: for another type, and for tensors of other shapes or types.
    """
    _refuse(a_scales=a_scales, global_scale=global_scale, is_zp_float=is_zp_float or None)
    return _marlin(
        a, c, b_q_weight, b_bias, b_scales, b_zeros, None, b_q_type, (size_m, size_n, size_k)
    )


def gptq_marlin_gemm(
    a: Tensor,
    c: Tensor | None,
    b_q_weight: Tensor,
    b_bias: Tensor | None,
    b_scales: Tensor,
    global_scale: Tensor | None,
    b_zeros: Tensor | None,
    g_idx: Tensor | None,
    perm: Tensor | None,
    workspace: Tensor | None,
    b_q_type: Any,
    size_m: int,
    size_n: int,
    size_k: int,
    is_k_full: bool = True,
    use_atomic_add: bool = False,
    use_fp32_reduce: bool = False,
    is_zp_float: bool = False,
) -> Tensor:
    """`marlin_gemm` as vLLM had it while it took groups by activations.

    Args:
        g_idx, perm: int32 [K], or None or without elements: the groups of the columns, sorted, and
            the order that sorts them, which the words are in. Groups must be of one size.
        is_k_full: must be True where there is a `perm`.

    Raises:
        WeightError: as `marlin_gemm`.
    """
    _refuse(global_scale=global_scale, is_zp_float=is_zp_float or None)
    perm = None if perm is None or not perm.numel() else perm
    if perm is not None:
        groups = len(b_scales)
        sizes = torch.arange(size_k, device=perm.device) // max(size_k // max(groups, 1), 1)
        if not is_k_full or g_idx is None or not torch.equal(g_idx.long(), sizes):
            raise WeightError(
                f"perm is for is_k_full=True and a sorted g_idx of {groups} groups of one size"
            )
    return _marlin(
        a, c, b_q_weight, b_bias, b_scales, b_zeros, perm, b_q_type, (size_m, size_n, size_k)
    )


def gptq_marlin_repack(
    b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
) -> Tensor:
    """int32 words of GPTQ [K*b/32, N] -> words of Marlin [K/16, N*b/2]; 4 and 8 bits.

    Raises:
        WeightError: for `is_a_8bit`, whose tiles are others, and for other shapes or types.
    """
    shape = (size_k * num_bits // 32, size_n)
    _check_repack(b_q_weight, shape, size_k, size_n, num_bits, is_a_8bit)
    return pack_marlin(unpack_gptq(b_q_weight, size_k, num_bits), num_bits)


def awq_marlin_repack(
    b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
) -> Tensor:
    """int32 words of AWQ GEMM [K, N*b/32] -> words of Marlin [K/16, N*b/2]; 4 and 8 bits.

    Raises:
        WeightError: for `is_a_8bit`, whose tiles are others, and for other shapes or types.
    """
    shape = (size_k, size_n * num_bits // 32)
    _check_repack(b_q_weight, shape, size_k, size_n, num_bits, is_a_8bit)
    return pack_marlin(unpack_awq(b_q_weight, num_bits).t(), num_bits)


def _check_two_dimensions(**arguments: Tensor) -> None:
    for name, tensor in arguments.items():
        if tensor.dim() != 2:
            raise WeightError(f"{name} must have two dimensions, got {list(tensor.shape)}")


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise WeightError(f"{name} is for types that are not supported: leave it out")


_MARLIN_TYPES = {"uint4b8": (4, 8), "uint8b128": (8, 128), "uint4": (4, 0), "uint8": (8, 0)}
"""Bits, and what is taken off each code; 0 where there are zero points."""


def _scalar_id(bits: int, offset: int) -> int:
    """The id of an unsigned ScalarType of vLLM: fields of 8, 8, 1, 32, 1 and 8 bits.

    They are exponent, mantissa, sign, bias, finite values alone, and how NaN is spelled, which is
    the second way (IEEE 754) for integers too.
    """
    return bits << 8 | offset << 17 | 1 << 50


_MARLIN_IDS = {_scalar_id(*about): name for name, about in _MARLIN_TYPES.items()}


def _marlin_type(given: Any) -> tuple[int, bool]:
    """Bits, and whether there are zero points, of a ScalarType, its id or its name."""
    number = getattr(given, "id", given)
    name = _MARLIN_IDS.get(number, number) if isinstance(number, int) else str(number)
    if name not in _MARLIN_TYPES:
        raise WeightError(
            f"words of Marlin are read of {', '.join(_MARLIN_TYPES)}, not of the type {given!r}"
        )
    bits, offset = _MARLIN_TYPES[name]
    return bits, not offset


def _marlin(
    a: Tensor,
    c: Tensor | None,
    stored: Tensor,
    bias: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    b_q_type: Any,
    sizes: tuple[int, int, int],
) -> Tensor:
    bits, has_zeros = _marlin_type(b_q_type)
    m, n, k = sizes
    zeros = None if zeros is None or not zeros.numel() else zeros
    if has_zeros == (zeros is None):
        there = "needs zero points: give b_zeros" if has_zeros else "has no zero points"
        raise WeightError(f"the type {b_q_type!r} {there}")
    if k % 16 or n % 64 or a.shape[-1:].numel() != k or a.numel() != m * k:
        raise WeightError(
            f"size_m, size_n, size_k are {list(sizes)}: x must be of M * K elements, K a multiple "
            f"of 16 and N of 64, got x {list(a.shape)}"
        )
    _check_two_dimensions(b_scales=scales)
    if bias is not None and tuple(bias.shape) != (n,):
        raise WeightError(f"b_bias must be [{n}], got {list(bias.shape)}")
    if c is not None and c.numel() != m * n:
        raise WeightError(f"c must be of M * N = {m * n} elements, got {list(c.shape)}")
    tensors = {"words": stored, "scales": scales, "qzeros": zeros, "perm": perm}
    y = words.linear(
        a,
        tensors,
        None if bias is None else marlin_bias(bias),
        format="marlin",
        bits=bits,
        n=n,
        k=k,
    )
    return y if c is None else c.copy_(y.view(c.shape))


def _check_repack(
    stored: Tensor, shape: tuple[int, int], k: int, n: int, bits: int, is_a_8bit: bool
) -> None:
    if is_a_8bit:
        raise WeightError("is_a_8bit=True is for tiles that are not read: use is_a_8bit=False")
    if bits not in (4, 8):
        raise WeightError(f"words of Marlin have 4 or 8 bits, got num_bits={bits}")
    if k % 16 or n % 64:
        raise WeightError(f"words of Marlin need K a multiple of 16 and N of 64, got {[k, n]}")
    if stored.dtype != torch.int32 or tuple(stored.shape) != shape:
        raise WeightError(
            f"b_q_weight must be int32 {list(shape)}, got {stored.dtype} {list(stored.shape)}"
        )
