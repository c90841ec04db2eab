"""Positions of a sequence, of which static activations per position have a scale each.

The row at position t of x [..., T, K] has the scale s[min(t, P - 1)]. In generation with a cache x
holds the newest tokens alone, and the hooks here tell layers how many are before them. That number
is one for the process, so one thread at a time runs such models, and another is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import LayerError

# A tensor that is written in place, so that compiled code reads it and is not compiled anew for
# each token.
_CACHED = torch.zeros((), dtype=torch.int64, device="cpu")

_running: set[int] = set()
"""The thread that runs a model now, where it is not compiled."""


def of_rows(shape: Sequence[int], device: torch.device) -> Tensor:
    """The position of each row of x [..., T, K], in T: int64 [M]. [K] is one row."""
    length = shape[-2] if len(shape) > 1 else 1
    return torch.arange(length, device=device).expand(*shape[:-2], length).reshape(-1)


def at(values: Tensor, places: Tensor) -> Tensor:
    """What positions, int64 [M], have of values [P]: [M]."""
    return values[places.clamp(max=len(values) - 1)]


def behind_cache(values: Tensor) -> Tensor:
    """Values [P] of the positions from the first that x now holds on: [P]."""
    return at(values, torch.arange(len(values), device=values.device) + _CACHED)


def follow_cache(model: nn.Module) -> None:
    """Makes a forward of `model` tell its layers how many tokens its cache holds.

    That is what `past_key_values` says, a cache of Transformers, where it is passed by name. A
    `cache_params`, as of Mamba, raises LayerError, and so does a second thread.
    """
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)


def _before(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("cache_params") is not None:
        raise LayerError(
            f"a {type(model).__name__} is given a cache_params, which does not say how many tokens "
            "it holds, and its layers have a scale for each position: use use_cache=False, or "
            "another scheme"
        )
    if not torch.compiler.is_compiling():
        mine = threading.get_ident()
        if _running - {mine}:
            raise LayerError(
                f"a {type(model).__name__} with scales of activations per position runs in another "
                "thread, and where a sequence is, is one number for all: run one at a time, or "
                "each in a process of its own"
            )
        _running.add(mine)
    cache = kwargs.get("past_key_values")
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor):
        _CACHED.copy_(length.reshape(()))
    else:
        _CACHED.fill_(length)


def _after(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        # It is called behind what `_before` refused as well.
        if threading.get_ident() not in _running:
            return
        _running.clear()
    _CACHED.zero_()
