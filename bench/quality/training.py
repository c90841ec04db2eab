"""Training of a quantized model, as anybody's script would do it: the rows with `qat=STEPS`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qkernels as qk
from qkernels.modules import FakeQuantLinear

_SEQUENCES, _AT_ONCE = 4, 2
"""Of a step, and of one backward pass."""

_SCALES, _VECTORS = 2e-3, 1e-3
"""How far a step of Adam moves them at first, as a part of their mean size."""


def train(model: nn.Module, dense: nn.Module, batches: Sequence[Tensor], steps: int) -> None:
    """Trains scales, norms and biases on KL(dense || model), in place. Codes stay.

    Args:
        model: quantized, of one type of floats; stays so.
        batches: token ids, int64 [B, T].
    """
    dtype = next(dense.parameters()).dtype
    # What is learned needs finer steps than 16 bits have; products are as they were, by autocast.
    model.float()
    qk.prepare_qat(model)
    optimizer = torch.optim.Adam(_groups(model), betas=(0.9, 0.99), eps=1e-16)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    drawn = _drawn(torch.cat(list(batches)).split(_AT_ONCE))
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
        for _ in range(_SEQUENCES // _AT_ONCE):
            (_divergence(model, dense, next(drawn)) * _AT_ONCE / _SEQUENCES).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Scales are as fine as they were learned once they are a quantized layer's.
    qk.convert_qat(model.eval())
    model.to(dtype)


def _groups(model: nn.Module) -> list[dict[str, object]]:
    """What is trained, and how fast; all else is frozen."""
    model.requires_grad_(False)
    found = [
        (module.scales, _SCALES)
        for module in model.modules()
        if isinstance(module, FakeQuantLinear) and module.scales is not None
    ]
    # Vectors are weights of norms, and biases.
    found += [(weight, _VECTORS) for weight in model.parameters() if weight.dim() == 1]
    return [
        {"params": [weight.requires_grad_()], "lr": rate * weight.detach().abs().mean().item()}
        for weight, rate in found
    ]


def _divergence(model: nn.Module, dense: nn.Module, ids: Tensor) -> Tensor:
    """The mean over all tokens."""
    with torch.no_grad():
        wanted = dense(ids).logits.float().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    found = logits.float().log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()


def _drawn(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """All parts in a drawn order, and again in another, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for place in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[place]
