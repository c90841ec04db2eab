"""A weight as torchao's files have it: one of its tensor classes, flattened into parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkernels.checkpoints.config import Config, brief, typed
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError
from qkernels.scheme import Activation, QuantScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Parts:
    """The parts of one weight.

    Attributes:
        layer: its name.
        kind: the name of its class.
        data: the attributes of the tensor, as the metadata has them.
        names: the parts that are stored.
        where: what errors call the metadata.
    """

    store: Store
    layer: str
    kind: str
    data: Config
    names: frozenset[str]
    where: str

    def key(self, part: str) -> str:
        """The name of a part's tensor in the file."""
        return f"{self.layer}._weight_{part}"

    def shape(self, part: str, dimensions: int) -> tuple[int, ...]:
        """The shape of a part that must have so many dimensions.

        Raises:
            CheckpointError: where it is missing or has others.
        """
        shape = self.store.shape(self.key(part))
        if len(shape) != dimensions:
            raise CheckpointError(
                f"{self.store.folder}: {self.key(part)} must have {dimensions} dimensions, got "
                f"{list(shape)}: weights are [N, K]"
            )
        return shape

    def take(
        self, part: str, shape: Sequence[int | None], dtypes: Sequence[torch.dtype] = ()
    ) -> Tensor:
        return self.store.take(self.key(part), shape, dtypes)

    def parameter(
        self, part: str, shape: tuple[int, int], dtypes: Sequence[torch.dtype] = FLOATS
    ) -> Tensor:
        """Scales or zero points; one for the whole weight may have any number of dimensions."""
        stored = self.store.shape(self.key(part))
        if shape == (1, 1) and all(size == 1 for size in stored):
            return self.take(part, stored, dtypes).reshape(1, 1)
        return self.take(part, shape, dtypes)

    def one(self, part: str, dtypes: Sequence[torch.dtype]) -> Tensor:
        """A part that must be one number, as a tensor without dimensions.

        Raises:
            CheckpointError: where it has several.
        """
        shape = self.store.shape(self.key(part))
        return self.take(part, shape if all(n == 1 for n in shape) else (1,), dtypes).reshape(())

    def any(self, part: str) -> bool:
        """Whether a part is there and not all zero, which the metadata does not say."""
        return part in self.names and bool(self.store.get(self.key(part)).any())

    def input_factor(self, k: int) -> Tensor | None:
        """`act_pre_scale`, by which inputs are multiplied: fp32 [K], or None."""
        if "act_pre_scale" not in self.names:
            return None
        shape = self.store.shape(self.key("act_pre_scale"))
        wanted = shape if shape[-1:] == (k,) and all(n == 1 for n in shape[:-1]) else (k,)
        return self.take("act_pre_scale", wanted, FLOATS).float().reshape(k)


@dataclass(frozen=True)
class TensorClass:
    """A class of tensors that is read.

    Attributes:
        parts: all that it may have.
        attributes: all that it may have; what an unknown one would change is not known.
        scheme: of a weight, from what the headers and the metadata say.
        read: (parts, scheme) -> its codes and fields.
    """

    parts: frozenset[str]
    attributes: frozenset[str]
    scheme: Callable[[Parts], QuantScheme]
    read: Callable[[Parts, QuantScheme], Mapping[str, Tensor | None]]


def type_and_data(value: object, where: str) -> tuple[str, Any]:
    """A value that the metadata spells as {"_type": ..., "_data": ...}."""
    entry = typed(value, dict, where)
    return typed(entry.get("_type"), str, f"{where}: _type"), entry.get("_data")


def block(parts: Parts, shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, or None for a scale a row and one for the whole weight.

    Raises:
        CheckpointError: where `block_size` is no list of two that divide the weight [N, K].
    """
    where, value = f"{parts.where}: block_size", parts.data.get("block_size")
    sizes = [typed(size, int, where) for size in typed(value, list, where)]
    n, k = shape
    if sizes in ([1, k], [n, k], [-1, -1], []):
        return None
    if len(sizes) != 2 or not (0 < sizes[0] <= max(n, 1) and 0 < sizes[1] <= max(k, 1)):
        raise CheckpointError(
            f"{where} {brief(value)} of a weight [{n}, {k}] is not supported: it must be rows and "
            "columns of a block"
        )
    return sizes[0], sizes[1]


def group_size(parts: Parts, shape: Sequence[int], *, ragged: bool = False) -> int | None:
    """Columns that share a scale, or None for all of a row and for all rows.

    Args:
        ragged: the last group may be short.

    Raises:
        CheckpointError: for blocks of several rows.
    """
    sizes = block(parts, shape)
    if sizes is None:
        return None
    if sizes[0] != 1 or (shape[1] % sizes[1] and not ragged):
        raise CheckpointError(
            f"{parts.where}: block_size {brief(parts.data['block_size'])} of a weight "
            f"[{shape[0]}, {shape[1]}] is not supported: blocks are columns of one row, whole rows "
            "or the whole weight"
        )
    return sizes[1]


def stated_shape(parts: Parts) -> tuple[int, int]:
    """The shape [N, K] that the metadata says, of a weight whose words are padded or packed."""
    where, value = f"{parts.where}: shape", parts.data.get("shape")
    sizes = [typed(size, int, where) for size in typed(value, list, where)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"{where} must be [N, K], got {brief(value)}")
    return sizes[0], sizes[1]


def quantized_inputs(parts: Parts, kwargs: str, dtype: str) -> Activation:
    """Inputs as `act_quant_kwargs` says, an object of the class `kwargs`.

    Raises:
        CheckpointError: for ways that no scheme has.
    """
    if parts.data.get("act_quant_kwargs") is None:
        return Activation()
    where = f"{parts.where}: act_quant_kwargs"
    name, arguments = type_and_data(parts.data["act_quant_kwargs"], where)
    arguments = typed(arguments, dict, where)
    granularity, about = type_and_data(arguments.get("granularity"), f"{where}: granularity")
    mapping = arguments.get("mapping_type") or {"_type": "MappingType", "_data": "SYMMETRIC"}
    symmetric = type_and_data(mapping, f"{where}: mapping_type")[1]
    bounds = [key for key in ("hp_value_lb", "hp_value_ub") if arguments.get(key) is not None]
    along = about.get("dim", -1) if isinstance(about, dict) else -1
    static = "act_quant_scale" in parts.names
    # Blocks of floats are left as they are, as the other formats' are.
    if granularity == "PerBlock" and dtype == "fp8" and name == kwargs and not bounds:
        return Activation()
    way = None
    if name == kwargs and along == -1 and not bounds and isinstance(symmetric, str):
        way = _WAYS.get((granularity, static, symmetric))
    if way is None or (way.endswith("asym") and dtype != "int8"):
        stated = "static " if static else ""
        raise CheckpointError(
            f"{where}: {stated}inputs quantized as {brief(arguments)} are not supported: supported "
            "are PerRow ones, and symmetric or static PerTensor ones; zero points for int8 alone"
        )
    return Activation(dtype, way)


_WAYS = {
    ("PerRow", False, "SYMMETRIC"): "token",
    ("PerRow", False, "ASYMMETRIC"): "tokenasym",
    ("PerTensor", False, "SYMMETRIC"): "tensor",
    ("PerTensor", True, "SYMMETRIC"): "static",
    ("PerTensor", True, "ASYMMETRIC"): "staticasym",
}
"""By granularity, whether the scale is stored, and the kind of mapping."""
