"""Writing text token by token with models of Transformers: `prepare_decoding`.

One token takes a small layer some microseconds, and Python as long for every step around it. So the
step from one token to the next is compiled, over a cache that does not grow.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import LayerError
from qkernels.integrations.fuse import fuse
from qkernels.modules import WQLinear
from qkernels.modules.experts import WQExperts, fused_experts

ATTENTION = "qkernels"
"""The name of `attention` among those of Transformers."""

_MOST_SUMMED = 256
"""Tokens in a cache up to which compiled sums are quicker than products of matrices."""


def prepare_decoding(model: nn.Module, example: Any = None) -> dict[str, Any]:
    """Readies a model to write token by token, in place; the options of its `generate` for that.

    `model.generate(ids, **prepare_decoding(model))` compiles the step from one token to the next
    when it is first taken, which is a minute or less, and again for another size of batch or cache.
    torch keeps what it compiled on disk.

    Quantized layers that read the same become one product (`fuse`). On a CPU, attention of a single
    token is computed by `attention` where it was torch's. Quantized experts are run in
    Transformers' way `batched_mm`, which compilers can follow. What takes that back is `unfuse`,
    `model.set_attn_implementation("sdpa")` and `model.set_experts_implementation("grouped_mm")`.
    After the first call weights, adapters and hooks must stay as they are: compiled code does not
    look at them again. What changes them calls `torch.compiler.reset()`. The options are for this
    model and for no other.

    Args:
        example: for `fuse`.

    Raises:
        LayerError: for a model that does not generate, or that Transformers has no cache of fixed
            size for; for one that reads no tokens, without an example; on a CPU, where there is no
            C++ compiler.
    """
    from transformers import CompileConfig

    name = type(model).__name__
    if not getattr(model, "_can_compile_fullgraph", False) or not model.can_generate():  # type: ignore[operator]
        raise LayerError(
            f"a {name} has no step that can be compiled: Transformers has no cache of fixed size "
            "for it"
        )
    on_cpu = next(model.parameters()).device.type == "cpu"
    compiler = os.environ.get("CXX", "g++")
    if on_cpu and shutil.which(compiler) is None:
        raise LayerError(
            f"torch compiles for the CPU with {compiler}, which is not there: install it, or name "
            "another by the environment variable CXX"
        )
    if any(type(module) is WQLinear for module in model.modules()):
        fuse(model, example)
    if on_cpu:
        _set_attention(model)
    _set_experts(model)

    def compile_step(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # Checks of what compiled code itself makes take a twentieth of a small model's step.
        return torch._inductor.compile(graph, inputs, {"size_asserts": False})

    config = CompileConfig(
        # A function of this model alone: torch takes what another one compiled for the same class
        # to be for any of its models, where nobody looks at their modules.
        backend=compile_step,
        mode=None,  # type: ignore[arg-type]
        # Looking at each buffer of each layer takes a fifth of a small model's step.
        options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
    )
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T * scaling + mask) v, as Transformers calls it; torch's own but for one token.

    For one token torch copies keys and values for each head that shares them, and its kernel for
    the CPU multiplies head by head: 2.9 ms for 32 heads of 64 with 4 of keys over 1024 tokens, and
    0.22 ms as here, where heads that share keys are rows of one product (bf16, 2 cores of an AMD
    EPYC).

    Args:
        query: [B, H, T, D].
        key, value: [B, H_kv, S, D].
        attention_mask: of booleans or to be added, [B, 1, T, S], or None.

    Returns:
        [B, T, H, D], and None.
    """
    heads, tokens, width = query.shape[1:]
    shared = attention_mask is None or attention_mask.shape[1] == 1
    # A bias of positions, for one, is what torch's function knows of.
    if tokens != 1 or dropout or not shared or options.get("position_bias") is not None:
        torch_attention: Any = _functions()["sdpa"]
        return torch_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    rows = query.reshape(len(query), key.shape[1], -1, width)
    # Loops without a call each, where they are compiled: they go through keys once for each row.
    summed = torch.compiler.is_compiling() and key.shape[2] <= _MOST_SUMMED
    if summed:
        scores = (rows[:, :, :, None].float() * key[:, :, None].float()).sum(dim=-1)
    else:
        scores = rows @ key.transpose(2, 3)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    if summed:
        y = (weights[..., None] * value[:, :, None].float()).sum(dim=-2).to(query.dtype)
    else:
        y = weights.to(query.dtype) @ value
    return y.reshape(len(query), 1, heads, -1), None


def _functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _set_attention(model: Any) -> None:
    """Has a model's text part use `attention` in place of torch's."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config = model.config
    text = config.get_text_config(decoder=True)
    if text._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return
    parts = [part for part in config.sub_configs if getattr(config, part) is text]
    _functions().register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation({parts[0] if parts else "": ATTENTION})


def _set_experts(model: Any) -> None:
    """Has a model pick the experts of each token, where all of them are quantized.

    Of dense ones it would copy the weights.
    """
    quantized = any(isinstance(module, WQExperts) for module in model.modules())
    if quantized and not fused_experts(model) and model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
