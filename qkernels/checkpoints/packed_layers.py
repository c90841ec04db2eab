"""What AWQ, GPTQ and Marlin words share: shapes held to the config, and its scheme."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkernels.checkpoints.format import REAL_ZEROS, WeightKind
from qkernels.checkpoints.packed_config import Settings
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import WEIGHT_TYPES, QuantScheme
from qkernels.weight import QuantizedWeight

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def matrix(store: Store, key: str) -> tuple[int, int]:
    """The shape of a tensor that must have two dimensions.

    Raises:
        CheckpointError: where it is missing, or has others.
    """
    shape = store.shape(key)
    if len(shape) != 2:
        raise CheckpointError(f"{store.folder}: {key} must have two dimensions, got {list(shape)}")
    return shape[0], shape[1]


def take(
    store: Store, key: str, shape: Sequence[int], dtypes: Sequence[torch.dtype], said: Settings
) -> Tensor:
    """A tensor of the shape that follows from the config.

    Raises:
        CheckpointError: with what the config says, where it has another one.
    """
    try:
        return store.take(key, shape, dtypes)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; the config says {said}") from None


def take_scales(
    store: Store, key: str, shape: tuple[int, int], scheme: QuantScheme, said: Settings
) -> Tensor:
    """Scales of the type that the scheme has."""
    return take(store, key, shape, (scheme.scale_dtype,), said)


def take_bias(store: Store, name: str, n: int) -> Tensor | None:
    """The bias of a layer, or None where it has none."""
    return store.take_if_there(f"{name}.bias", (n,), _FLOATS)


def check_four_bits(store: Store, name: str, said: Settings) -> None:
    """Raises CheckpointError where the config says that a layer has other than 4 bits."""
    if said.bits not in (None, 4):
        raise CheckpointError(f"{store.folder}: {name} has {said.bits} bits, and 4 are supported")


def scheme_of(
    store: Store,
    name: str,
    said: Settings,
    bits: int,
    k: int,
    groups: int,
    *,
    scales: str = "scales",
    ragged: bool = False,
) -> QuantScheme:
    """The scheme of a layer with `k` columns and `groups` scales a row, in the type of its scales.

    Args:
        scales: what the format calls them.
        ragged: its last group may be short.

    Raises:
        CheckpointError: where the settings say something else, or no scheme holds it.
    """
    where, size = f"{store.folder}: {name}", said.group_size
    if size is None:
        size = -1 if groups <= 1 else -(-k // groups)
    if size != -1 and not 0 < size < 1 << 31:
        raise CheckpointError(f"{where}: group_size must be -1 or a number of columns, got {size}")
    wanted = 1 if size == -1 else -(-k // size)
    if groups != wanted:
        raise CheckpointError(
            f"{where} has scales for {groups} groups, and {k} columns make {wanted}; "
            f"the config says {said}"
        )
    if not ragged and size != -1 and k % size:
        raise CheckpointError(
            f"{where} has {k} columns, which are no groups of {size}; the config says {said}"
        )
    weight = WEIGHT_TYPES.get(f"int{bits}")
    if weight is None:
        raise CheckpointError(f"{where}: weights of {bits} bits are not supported")
    try:
        return QuantScheme(
            weight=weight,
            group_size=None if size == -1 else size,
            symmetric=bool(said.symmetric),
            scale_dtype=store.dtype(f"{name}.{scales}"),
        )
    except SchemeError as error:
        raise CheckpointError(f"{where}: {error}") from None


def needed_zeros(zeros: Tensor, scheme: QuantScheme, key: str) -> Tensor | None:
    """Zero points as a scheme has them: None for a symmetric one, which stores half its range.

    Raises:
        CheckpointError: where the stored ones are others.
    """
    if not scheme.symmetric:
        return zeros
    if (zeros != scheme.implied_zero).any():
        raise CheckpointError(
            f"{key} holds zero points other than {scheme.implied_zero}, such as "
            f"{int(zeros[zeros != scheme.implied_zero][0])}, and the config says that the weights "
            "are symmetric: correct that, or the version of the format"
        )
    return None


def stored_zeros(weight: QuantizedWeight) -> Tensor:
    """Zero points as the words have them, which are those of symmetric weights as well."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, weight.scheme.implied_zero, dtype=torch.uint8)


def why_not_integers(kind: WeightKind, fields: frozenset[str]) -> str | None:
    """Why integer words with scales, zero points and `fields` alone do not hold a weight."""
    scheme = kind.scheme
    if scheme.weight.kind == "codebook":
        return f"has no {scheme.weight.name} codebooks"
    if scheme.weight.kind == "float8":
        return "has no float8 weights"
    if not scheme.weight_only:
        return "has no quantized activations"
    if scheme.scale_levels != "one":
        return "has no scales of several levels"
    beyond = sorted(kind.fields - fields - {"scales", "zeros"})
    if beyond:
        return f"has no tensor for {', '.join(beyond)}"
    if kind.real_zeros:
        return REAL_ZEROS
    return None
