"""Tensors that a program holds, for the readers of formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qkernels.checkpoints.store import _DTYPES, Store, _Entry

_SPELLED = {dtype: name for name, dtype in _DTYPES.items()}


class HeldStore(Store):
    """Tensors by name, in the place of a folder's.

    Args:
        tensors: on any device; those that `get` gives are on the CPU.
        where: what errors call the place that they are from.
        metadata: what a file's header would say beside them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        where: str = "the model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = self.where = self.config_path = Path(where)
        self.metadata = dict(metadata or {})
        self._tensors = dict(tensors)
        self._entries = {
            name: _Entry(
                file=self.folder,
                dtype=_SPELLED.get(tensor.dtype, str(tensor.dtype)),
                shape=tuple(tensor.shape),
                start=0,
                stop=tensor.numel() * tensor.dtype.itemsize,
            )
            for name, tensor in tensors.items()
        }

    def get(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        self._entry(name)
        return self._tensors[name].detach().to("cpu", copy=True).contiguous()
