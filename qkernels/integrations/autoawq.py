"""AutoAWQ's compiled extensions, `awq_ext` and `awq_v2_ext`, on our kernels.

    import qkernels.integrations.autoawq
    qkernels.integrations.autoawq.install()     # before AutoAWQ is imported
    import awq

The functions have the names, arguments and results of the extensions', for any shape, on the CPU
too. What they mean is w = (q - z) * s, in awq_v2_ext q * s + zeros; sums are in fp32. The words
stay as they are, with packed twins beside them: see `integrations/words.py`. What has no weights,
and fused modules call, is plain torch.
Source: AutoAWQ (Casper Hansen, MIT licence) and its kernels, for the signatures.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qkernels.errors import LayerError, WeightError
from qkernels.integrations import words

_BITS = 4
_MOE_BLOCK = 16
"""The rows of an expert in grouped_gemm_forward come in blocks of so many."""

_installed: dict[str, ModuleType] = {}
_replaced: dict[str, ModuleType | None] = {}
"""What was there before, under the names that had anything."""


def install() -> None:
    """Puts modules called `awq_ext` and `awq_v2_ext` into `sys.modules`, until `uninstall`.

    Raises:
        LayerError: where AutoAWQ was imported before: it has looked for its extensions then.
    """
    if _installed:
        return
    if "awq" in sys.modules:
        raise LayerError(
            "AutoAWQ has been imported already, and looks for its kernels then alone: call "
            "qkernels.integrations.autoawq.install() before the first import of awq"
        )
    for name, functions in _EXTENSIONS.items():
        module = ModuleType(name, "In place of AutoAWQ's extension, by qkernels.")
        module.__spec__ = ModuleSpec(name, None)
        for function in functions:
            setattr(module, function.__name__, function)
        if name in sys.modules:
            _replaced[name] = sys.modules[name]
        sys.modules[name] = _installed[name] = module


def uninstall() -> None:
    """Takes the modules away again. What AutoAWQ has imported keeps them."""
    modules: dict[str, Any] = sys.modules
    for name, ours in _installed.items():
        if modules.get(name) is not ours:
            # Someone has put another there since.
            continue
        del modules[name]
        if name in _replaced:
            modules[name] = _replaced[name]
    _installed.clear()
    _replaced.clear()


def gemm_forward_cuda(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, split_k_iters: int
) -> Tensor:
    """y [M, N] for x [M, K] and words of GEMM; `split_k_iters` is not used."""
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    n, k = scales.shape[-1], len(qweight)
    return words.linear(x, tensors, None, format="awq", bits=_BITS, n=n, k=k)


def gemv_forward_cuda(
    x: Tensor, qweight: Tensor, scales: Tensor, qzeros: Tensor, group_size: int
) -> Tensor:
    """y [M, N] for x [M, K] and words of GEMV."""
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    n, k = len(qweight), 8 * qweight.shape[-1]
    about = {"bits": _BITS, "n": n, "k": k, "group": group_size}
    return words.linear(x, tensors, None, format="awq-gemv", **about)


def gemmv2_forward_cuda(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    group_size: int,
    split_k_iters: int,
) -> Tensor:
    """`gemv_forward_cuda`; `split_k_iters` is not used."""
    return gemv_forward_cuda(x, qweight, scales, qzeros, group_size)


def dequantize_weights_cuda(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    split_k_iters: int,
    thx: int,
    thy: int,
    dbg: bool,
) -> Tensor:
    """The weight [K, N], or [E, K, N] of experts, in the type of the scales, of words of GEMM.

    The last four arguments are not used.
    """
    if qweight.dim() == 3:
        experts = zip(qweight, scales, qzeros, strict=True)
        return torch.stack([dequantize_weights_cuda(*e, 0, 0, 0, False) for e in experts])
    tensors = {"qweight": qweight, "scales": scales, "qzeros": qzeros}
    n, k = scales.shape[-1], len(qweight)
    weight = words.dequantize(tensors, format="awq", bits=_BITS, n=n, k=k)
    return weight.t().to(scales.dtype).contiguous()


def grouped_gemm_forward(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    topk_weights: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_padded: Tensor,
    mul_weights: bool,
    split_k_iters: int,
) -> Tensor:
    """y [T, top_k, N] for x [T, 1 or top_k, K] and words of GEMM [E, K, N/8] of experts.

    Args:
        topk_weights: [T, top_k]; the rows of y are multiplied by them where `mul_weights`.
        sorted_token_ids, expert_ids, num_tokens_post_padded: of `moe_alig_block_size`, with blocks
            of 16 rows.
        split_k_iters: not used.
    """
    tokens, top_k = topk_weights.shape
    count = int(num_tokens_post_padded)
    ids = sorted_token_ids[:count].long()
    experts = expert_ids.long().repeat_interleave(_MOE_BLOCK)[:count]
    experts = experts[ids < tokens * top_k]
    ids = ids[ids < tokens * top_k]
    rows, n = x.reshape(-1, x.shape[-1]), scales.shape[-1]
    y = x.new_zeros(tokens * top_k, n)
    for expert in experts.unique().tolist():
        mine = ids[experts == expert]
        given = rows[mine if x.shape[1] == top_k else mine // top_k]
        out = gemm_forward_cuda(given, qweight[expert], scales[expert], qzeros[expert], 0)
        if mul_weights:
            out = (out * topk_weights.flatten()[mine, None]).to(y.dtype)
        y[mine] = out
    return y.view(tokens, top_k, n)


def moe_alig_block_size(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_post_pad: Tensor,
) -> None:
    """Sorts the entries of `topk_ids` by expert, each expert's filled up to whole blocks.

    Writes their positions to `sorted_token_ids`, whose padding is left as it is, the expert of each
    block to `expert_ids`, and the number of positions, with padding.
    """
    flat = topk_ids.flatten().long()
    counts = flat.bincount(minlength=num_experts)
    blocks = -(-counts // block_size)
    starts = (blocks.cumsum(0) - blocks) * block_size
    order = flat.argsort(stable=True)
    within = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    sorted_token_ids[starts[flat[order]] + within] = order.to(sorted_token_ids.dtype)
    owners = torch.arange(num_experts, device=flat.device).repeat_interleave(blocks)
    expert_ids[: len(owners)] = owners.to(expert_ids.dtype)
    num_tokens_post_pad.fill_(int(blocks.sum()) * block_size)


def topk_softmax(
    topk_weights: Tensor, topk_indices: Tensor, token_expert_indices: Tensor, gating_output: Tensor
) -> None:
    """Writes the largest probabilities [T, top_k] of `gating_output` [T, E], and their experts.

    `token_expert_indices` is set to j * T + t for token t and rank j.
    """
    tokens, top_k = topk_weights.shape
    values, indices = gating_output.float().softmax(-1).topk(top_k, dim=-1)
    topk_weights.copy_(values)
    topk_indices.copy_(indices)
    place = torch.arange(tokens * top_k, device=indices.device)
    token_expert_indices.copy_(place.view(top_k, tokens).t())


def silu_and_mul(out: Tensor, input: Tensor) -> None:
    """Writes silu(gate) * up to `out` [..., D] for `input` [..., 2D], the gate first."""
    gate, up = input.chunk(2, dim=-1)
    out.copy_(functional.silu(gate.float()) * up.float())


def layernorm_forward_cuda(input: Tensor, gamma: Tensor, out: Tensor, eps: float) -> None:
    """Writes RMSNorm of `input` [..., D] times `gamma` [D] to `out`."""
    wide = input.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    out.copy_(wide * scale * gamma.float())


def rotary_embedding_neox(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor
) -> None:
    """Rotates query and key [T, heads * head_size] in place, halves of each head as pairs.

    Args:
        positions: [T].
        cos_sin_cache: [positions, D], cosines in the first half; D columns of a head are rotated.
    """
    width = cos_sin_cache.shape[-1]
    cos, sin = cos_sin_cache[positions.flatten().long()].float()[:, None].chunk(2, dim=-1)
    for tensor in (query, key):
        heads = tensor.view(len(cos), -1, head_size)[..., :width]
        first, second = heads.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))


def gemv_forward_cuda_decode(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    m: int,
    n: int,
    k: int,
    group_size: int,
) -> Tensor:
    """y [..., N] for x [..., K] and words of GEMV_FAST."""
    tensors = {"qweight": qweight, "scales": scales, "qzeros": zeros}
    about: dict[str, Any] = {"bits": _BITS, "n": n, "k": k, "group": group_size}
    return words.linear(x, tensors, None, format="awq-gemv-fast", **about)


def gemm_forward_cuda_prefill(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """y [..., N] for x [..., K] and words of GEMV_FAST, whose groups its padding tells.

    Raises:
        WeightError: where the rows of `scales` that are not zero are no groups of K.
    """
    k = qweight.shape[-1]
    used = scales.any(dim=1).nonzero()
    groups = int(used.max()) + 1 if len(used) else 1
    if k % groups:
        raise WeightError(f"scales of {groups} groups, less their padding, do not fit K = {k}")
    rows = x.numel() // max(k, 1)
    return gemv_forward_cuda_decode(
        x, qweight, scales, zeros, rows, scales.shape[-1], k, k // groups
    )


_EXTENSIONS = {
    "awq_ext": (
        gemm_forward_cuda,
        gemmv2_forward_cuda,
        gemv_forward_cuda,
        dequantize_weights_cuda,
        grouped_gemm_forward,
        moe_alig_block_size,
        topk_softmax,
        silu_and_mul,
        layernorm_forward_cuda,
        rotary_embedding_neox,
    ),
    "awq_v2_ext": (gemv_forward_cuda_decode, gemm_forward_cuda_prefill),
}
