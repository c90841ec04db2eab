"""Training of a quantized model, as anybody's script would do it: the rows with `qat=STEPS`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import qkernels as qk
from qkernels.modules import FakeQuantLinear
from qkernels.quantizers.gradients import divergence

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
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * (step + 0.5) / steps)) / 2
    )
    model.train()
    drawn = _drawn(torch.cat(list(batches)).split(_AT_ONCE))
    for _ in range(steps):
        for _ in range(_SEQUENCES // _AT_ONCE):
            (_loss(model, dense, next(drawn)) * _AT_ONCE / _SEQUENCES).backward()
        optimizer.step()
        falling.step()
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


def _loss(model: nn.Module, dense: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = dense(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    return divergence(logits, wanted)


def _drawn(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """All parts in a drawn order, and again in another, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for place in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[place]
