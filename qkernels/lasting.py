"""Tensors that outlive the call which first needs them: tables, and weights that are packed late.

The first call may be one whose memory is not its own. `torch.compile(mode="reduce-overhead")` runs
it with everything that its thread allocates in the pool of a CUDA graph, and takes what is left
there for a mistake. So on a GPU another thread makes what lasts, on the default stream: its memory
is the allocator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, wraps
from typing import TypeVar

import torch

T = TypeVar("T")


def made_to_last(make: Callable[[], T], device: torch.device) -> T:
    """What `make` gives, whose tensors on `device` are in no pool but the allocator's own.

    On a GPU, the first call for it must not be captured: it waits for what it has made.
    """
    if device.type != "cuda":
        return make()
    caller, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)

    def run() -> T:
        with torch.cuda.stream(default):
            default.wait_stream(caller)  # on which what `make` reads may still be written
            made = make()
            default.synchronize()
        return made

    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(run).result()


def once_a_device(make: Callable[..., T]) -> Callable[..., T]:
    """`make(device, ...)`, whose tensors last and are made once for the same arguments.

    They are never given up: CUDA graphs that were captured with them read them at each replay.
    """
    kept = cache(lambda device, *rest: made_to_last(partial(make, device, *rest), device))

    @wraps(make)
    def found(device: torch.device | str, *rest: Hashable) -> T:
        device = torch.device(device)
        if torch.compiler.is_compiling():
            return make(device, *rest)  # a part of the graph
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        made: T = kept(device, *rest)
        return made

    return found
