"""Packed twins of buffers that others lay out: made at the first call, and gone with the buffers.

A twin is known by the memory that it was packed from, which the table does not keep alive. Where a
buffer was written to in place, as torch's version of it tells, the twin is made anew. Tensors made
in inference mode have no version, and a write through `.data` leaves it as it is: whoever does
either calls `forget`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkernels.lasting import made_to_last
from qkernels.modules.linear import WQLinear


@dataclass(frozen=True)
class _Twin:
    storages: tuple[weakref.ref[Any], ...]
    marks: tuple[Any, ...]
    layer: WQLinear


_lock = threading.Lock()
_twins: dict[tuple[int, int], _Twin] = {}
"""By the identity of the first buffer's memory, whose end takes the entry away, and where in it the
buffer begins: weights of experts lie behind each other in one."""


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
    key = _key(present[0])
    with _lock:
        held = _twins.get(key)
    if (
        held is not None
        and held.marks == marks
        and all(ref() is storage for ref, storage in zip(held.storages, storages, strict=True))
    ):
        return held.layer
    layer = made_to_last(make, present[0].device)
    with _lock:
        if key not in _twins:
            weakref.finalize(storages[0], _twins.pop, key, None)
        refs = tuple(weakref.ref(storage) for storage in storages)
        _twins[key] = _Twin(refs, marks, layer)
    return layer


def forget(first: Tensor) -> None:
    """Has the twin of the buffers whose first is `first` made anew."""
    with _lock:
        held = _twins.get(_key(first))
        if held is not None:
            _twins[_key(first)] = _Twin(held.storages, (), held.layer)


def _key(first: Tensor) -> tuple[int, int]:
    return id(first.untyped_storage()), int(first.storage_offset()) * first.itemsize


def _mark(buffer: Tensor) -> tuple[Any, ...]:
    version = None if buffer.is_inference() else buffer._version
    return version, buffer.data_ptr(), buffer.dtype, buffer.shape, buffer.stride()
