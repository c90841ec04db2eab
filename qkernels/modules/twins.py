"""Packed twins of buffers that others lay out: made at the first call, and gone with the buffers.

A twin is known by the memory that it was packed from, which the table does not keep alive. Where a
buffer was written to in place, as torch's version of it tells, the twin is made anew. Tensors made
in inference mode have no version: whoever writes to them calls `forget`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkernels.modules.linear import WQLinear


@dataclass(frozen=True)
class _Twin:
    storages: tuple[weakref.ref[Any], ...]
    marks: tuple[Any, ...]
    layer: WQLinear


_lock = threading.Lock()
_twins: dict[int, _Twin] = {}
"""By the identity of the first buffer's memory, whose end takes the entry away."""


def of(
    buffers: Sequence[Tensor | None], make: Callable[[], WQLinear], meaning: Hashable = None
) -> WQLinear:
    """The twin of `buffers`, of which the first is not None; `make` makes one where there is none.

    Views of the same memory, such as a compiled graph makes, have the same twin.

    Args:
        meaning: what else the twin depends on.
    """
    present = [buffer for buffer in buffers if buffer is not None]
    storages = [buffer.untyped_storage() for buffer in present]
    marks = (meaning, *(_mark(buffer) for buffer in present))
    with _lock:
        held = _twins.get(id(storages[0]))
    if (
        held is not None
        and held.marks == marks
        and all(ref() is storage for ref, storage in zip(held.storages, storages, strict=True))
    ):
        return held.layer
    layer = make()
    with _lock:
        if id(storages[0]) not in _twins:
            weakref.finalize(storages[0], _twins.pop, id(storages[0]), None)
        refs = tuple(weakref.ref(storage) for storage in storages)
        _twins[id(storages[0])] = _Twin(refs, marks, layer)
    return layer


def forget(first: Tensor) -> None:
    """Has the twin of the buffers whose first is `first` made anew."""
    with _lock:
        held = _twins.get(id(first.untyped_storage()))
        if held is not None:
            _twins[id(first.untyped_storage())] = _Twin(held.storages, (), held.layer)


def _mark(buffer: Tensor) -> tuple[Any, ...]:
    version = None if buffer.is_inference() else buffer._version
    return version, buffer.data_ptr(), buffer.dtype, buffer.shape, buffer.stride()
