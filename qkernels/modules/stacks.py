"""The packed weights of layers that are alike as one tensor a buffer, [E, ...].

Each layer's buffers are its slices, so nothing is held twice, and each stays what it was: its
buffers, their names, what is saved of it and what is loaded into it. One operator multiplies rows
with all of them (`ops.linear_grouped`), which kernels can do in one launch.

A slice is no view: it has a storage of its own, on the memory of the stack, which it keeps alive.
So pickles and copies of a layer hold that layer alone, and safetensors, which refuses tensors that
are a part of a storage, saves it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import cast

import torch
from torch import Tensor, nn

from qkernels import ops
from qkernels.lasting import made_to_last
from qkernels.modules.linear import WQLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_making = threading.Lock()


class Stack:
    """The weights of layers, as `ops.linear_grouped` takes them.

    Attributes:
        buffers: [E, ...] each, in the order of the layers' own.
        spec: of one layer.
    """

    def __init__(self, layers: Sequence[WQLinear]) -> None:
        """Puts the layers' buffers behind each other, one kind at a time, and shows each its part.

        They must be alike: see `why_not_stacked`.
        """
        assert why_not_stacked(layers) is None
        self.spec = layers[0]._spec
        self._layers = list(layers)
        device = layers[0]._words.device
        with _making:
            self.buffers = [
                made_to_last(partial(_stack, self._layers, name), device)
                for name in layers[0]._held
            ]
        # What is asked at each call is asked of these, in loops that are not Python's.
        self._vars = [vars(layer) for layer in layers]
        self._hooks = [each[name] for each in self._vars for name in _HOOKS]
        self._tables = [layer._buffers for layer in layers]
        self._held = [*chain.from_iterable(map(dict.values, self._tables))]
        self._ends = [
            (cast(Tensor, layer._buffers[name]), stack[number].data_ptr())
            for number, layer in ((0, layers[0]), (-1, layers[-1]))
            for name, stack in zip(layer._held, self.buffers, strict=True)
        ]
        self.look_again()

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """y [M, N] of x [M, K]: see `ops.linear_grouped`; ends of any type, anywhere."""
        ends = ends.to(x.device, torch.int32)
        return ops.linear_grouped_operator(x, ends, self.buffers, self.spec)

    def batched(self, x: Tensor) -> Tensor:
        """y [E, T, N] of T rows for each weight: x [E, T, K]."""
        weights, rows, _ = x.shape
        ends = torch.arange(1, weights + 1, dtype=torch.int32, device=x.device) * rows
        return self.product(x.flatten(0, 1), ends).unflatten(0, (weights, rows))

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether `layers` are the stacked ones, and hold their slices.

        Buffers are known by their identity. Of those whose memory was replaced (`.data`) the first
        and the last layer's are seen.
        """
        return (
            layers == self._layers
            and all(map(is_, chain.from_iterable(map(dict.values, self._tables)), self._held))
            and all(held.data_ptr() == address for held, address in self._ends)
        )

    def is_bare(self) -> bool:
        """Whether nothing is put on the layers since they were looked at."""
        return (
            not any(self._hooks)
            and [*map(len, self._vars)] == self._sizes
            and all(type(layer) is WQLinear for layer in self._layers)
            and not _has_global_hooks()
        )

    def look_again(self) -> None:
        """Takes the layers as they are for bare."""
        assert why_not_stacked(self._layers) is None
        self._sizes = [len(each) for each in self._vars]


def product_by_number(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, numbers: Tensor, weights: int
) -> Tensor:
    """y [S, T, N] of x [S, T, K], T rows for each of the weights with these numbers [S].

    They are sorted for `product`, which takes rows and ends; nothing is read on the host.
    """
    picks, rows, _ = x.shape
    numbers, order = numbers.sort(stable=True)
    each = torch.arange(weights, dtype=numbers.dtype, device=numbers.device)
    ends = torch.searchsorted(numbers, each, right=True, out_int32=True) * rows
    y = product(x[order].flatten(0, 1), ends).unflatten(0, (picks, rows))
    return y[order.argsort()]


@torch.inference_mode(False)
@torch.no_grad()
def _stack(layers: Sequence[WQLinear], name: str) -> Tensor:
    """The buffers of that name as one, whose slices the layers hold from then on."""
    stack = ops.stacked([cast(Tensor, layer._buffers[name]) for layer in layers])
    memory = stack.untyped_storage()
    for number, layer in enumerate(layers):
        part = stack[number]
        start = part.storage_offset() * part.itemsize
        own = memory[start : start + part.nbytes]
        layer._buffers[name] = part.new_empty(0).set_(own, 0, part.shape, part.stride())
    return stack


def why_not_stacked(layers: Sequence[nn.Module]) -> str | None:
    """Why layers cannot be run as a stack, or None."""
    if any(type(layer) is not WQLinear for layer in layers):
        return "they are not all WQLinear"
    parts = cast(Sequence[WQLinear], layers)
    first = parts[0]
    if any(part._spec != first._spec for part in parts):
        return "their weights are not of one kind"
    if any(part.bias is not None for part in parts):
        return "some have a bias"
    if first.scheme.activation.by_position:
        return "rows that are sorted by their expert have lost their positions"
    if _has_global_hooks() or any("forward" in vars(part) for part in parts):
        return "something is put on them"
    if any(vars(part)[name] for part in parts for name in _HOOKS):
        return "something is put on them"
    for buffers in zip(*(part._packed_buffers() for part in parts), strict=True):
        kinds = {(type(each), each.shape, each.dtype, each.device) for each in buffers}
        if len(kinds) > 1:
            return "their buffers differ in shape, type or device"
        if type(buffers[0]) is not Tensor or buffers[0].device.type == "meta":
            return "their buffers have no values of their own"
    return None


def _has_global_hooks() -> bool:
    return bool(nn.modules.module._has_any_global_hook())
