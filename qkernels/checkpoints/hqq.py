"""The format of HQQ: groups with real zero points, each layer with its own description.

With R = N*K / g groups, which follow each other row by row and may begin and end within rows:

W_q         codes [R, g] packed along the groups: with 4 bits the first half of the groups in the
            high bits of a byte and the second half in the low ones (`_PACKINGS`); where
            view_as_float is set, the same bytes as numbers of another type
scale, zero [R, 1] floating: w = (code - zero) * scale
shape int64 [2], and nbits, group_size, axis, packing, ...: numbers, and strings as their bytes

config.json may have no quantization_config at all: such folders are known by W_q.
Source: the hqq package (Apache-2.0), read as documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkernels.checkpoints.blocks import block_group, block_of_groups
from qkernels.checkpoints.config import Config, brief, only, quantization_of, strings, typed
from qkernels.checkpoints.format import Format, StoredLayer, only_read
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.scheme import WEIGHT_TYPES, QuantScheme
from qkernels.weight import QuantizedWeight

NAME = "hqq"


@dataclass(frozen=True)
class _Packing:
    """How codes stand in the numbers of W_q: the first groups in the highest bits."""

    bits: int
    dtype: torch.dtype
    each: int
    weight: str

    @property
    def shifts(self) -> tuple[int, ...]:
        return tuple(range((self.each - 1) * self.bits, -1, -self.bits))


_PACKINGS = {
    "8bit_u8": _Packing(8, torch.uint8, 1, "int8"),
    "4bit_u8": _Packing(4, torch.uint8, 2, "int4"),
    "3bit_32": _Packing(3, torch.int32, 10, "int3"),
    "2bit_u8": _Packing(2, torch.uint8, 4, "int2"),
    # Codes of one bit are held in two.
    "1bit_u8": _Packing(1, torch.uint8, 8, "int2"),
}
_PACKING_OF: dict[float, str] = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
"""By nbits. 1.58 bits are three values."""

_CODES = "W_q"
_NEEDED = ("scale", "zero", "shape", "nbits", "axis")
_PARTS = (
    *(_CODES, *_NEEDED, "bias", "group_size", "packing", "channel_wise", "view_as_float"),
    *("quant_scale", "quant_zero"),
    # How codes were found, and where and in what type hqq computes.
    *("unpack_view_dtype", "compute_dtype", "offload_meta", "optimize", "round_zero"),
    *("encoded_state_dict", "stores_quant_config"),
)
_TEXT_BYTES = 64

_KEYS = frozenset(("quant_method", "quant_config", "skip_modules"))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class _About:
    """What the tensors of a layer say of it; `block` is None where groups are no blocks."""

    n: int
    k: int
    block: int | None
    packing: _Packing
    codes: int
    as_floats: bool

    @property
    def rows(self) -> int:
        """Of the codes as they were packed."""
        return self.n * self.k // self.block if self.block else self.n


def _detect(config: Config, store: Store) -> bool:
    section = quantization_of(config)
    if section is not None:
        return section.get("quant_method") == NAME
    return any(key.endswith("." + _CODES) for key in store)


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = quantization_of(config) or {}
    only(section, _KEYS, "quantization_config")
    skipped = set(strings(section.get("skip_modules") or [], "skip_modules"))
    parts: dict[str, list[str]] = {}
    for key in store:
        layer, _, part = key.rpartition(".")
        parts.setdefault(layer, []).append(part)
    layers = {}
    for name, found in parts.items():
        if _CODES not in found:
            continue
        if name in skipped:
            raise CheckpointError(f"{name} is quantized in the file, and skip_modules names it")
        unknown = sorted(set(found) - set(_PARTS))
        if unknown or any(_flag(store, f"{name}.{key}") for key in ("quant_scale", "quant_zero")):
            raise CheckpointError(
                f"{store.folder}: {name} has scales or zero points that are quantized themselves "
                f"({', '.join(unknown) or 'quant_scale, quant_zero'}), which is not supported: "
                "quantize without quant_scale and quant_zero"
            )
        layers[name] = _plan_layer(store, name, section, found)
    return layers


def _plan_layer(store: Store, name: str, section: Config, parts: list[str]) -> StoredLayer:
    for part in _NEEDED:
        if part not in parts:
            raise CheckpointError(f"{store.folder}: {name}.{part} is missing")
    sizes = store.take(f"{name}.shape", (2,), (torch.int64, torch.int32)).tolist()
    n, k = (int(size) for size in sizes)
    bits, axis = _number(store, f"{name}.nbits"), _number(store, f"{name}.axis")
    size = int(_number(store, f"{name}.group_size")) if "group_size" in parts else None
    _check_said(section, name, {"nbits": bits, "axis": axis, "group_size": size})
    bits = round(bits, 2)
    if bits not in _PACKING_OF:
        known = ", ".join(map(str, _PACKING_OF))
        raise CheckpointError(f"{store.folder}: {name}.nbits is {bits}, not one of {known}")
    if axis != 1:
        raise CheckpointError(
            f"{store.folder}: {name}.axis is {axis:g}, and groups along the outputs are not "
            "supported: quantize with axis=1"
        )
    packing = _PACKING_OF[bits]
    stated = _text(store, f"{name}.packing") if "packing" in parts else packing
    if stated != packing:
        raise CheckpointError(
            f"{store.folder}: {name}.packing is {stated!r}, and {bits:g} bits are {packing!r}"
        )
    viewed = _flag(store, f"{name}.view_as_float")
    by_channel = "channel_wise" not in parts or _flag(store, f"{name}.channel_wise")
    if n < 1 or k < 1 or (size is not None and (size < 1 or n * k % size)):
        raise CheckpointError(
            f"{store.folder}: {name} of shape [{n}, {k}] does not split into groups of {size}"
        )
    about = _About(n, k, size if by_channel else None, _PACKINGS[packing], round(2**bits), viewed)
    scale = store.dtype(f"{name}.scale")
    try:
        scheme = QuantScheme(
            WEIGHT_TYPES[about.packing.weight],
            group_size=block_group(k, size) if size is not None and by_channel else None,
            per_tensor=not by_channel,
            symmetric=False,
            scale_dtype=scale,
        )
    except SchemeError as error:
        raise CheckpointError(f"{store.folder}: {name}.scale: {error}") from None
    tensors = tuple(f"{name}.{part}" for part in parts)
    return StoredLayer(scheme, tensors, about)


def _check_said(section: Config, name: str, stored: dict[str, float | None]) -> None:
    """Raises where the config says something else of a layer than its own tensors do."""
    config = typed(section.get("quant_config") or {}, dict, "quant_config")
    if "weight_quant_params" not in config:
        # Each kind of layer may have its own, such as "self_attn.q_proj".
        config = next((config[tag] for tag in config if name.endswith(f".{tag}")), {})
    said = typed(config, dict, f"quant_config of {name}").get("weight_quant_params") or {}
    for key, value in stored.items():
        other = typed(said, dict, "weight_quant_params").get(key, value)
        if other != value and not (
            isinstance(other, float) and round(other - (value or 0), 2) == 0
        ):
            raise CheckpointError(
                f"quantization_config says {key}={brief(other)}, and {name}.{key} is {value}"
            )


def _number(store: Store, key: str) -> float:
    """A number that stands in a tensor of its own."""
    if store.nbytes(key) > 8:
        raise CheckpointError(f"{store.folder}: {key} must be one number")
    value = store.get(key)
    if value.numel() != 1 or not bool(value.float().isfinite()):
        raise CheckpointError(f"{store.folder}: {key} must be one number, got {value.tolist()}")
    return float(value)


def _flag(store: Store, key: str) -> bool:
    return key in store and _number(store, key) != 0


def _text(store: Store, key: str) -> str:
    if store.nbytes(key) > _TEXT_BYTES:
        raise CheckpointError(f"{store.folder}: {key} is no name of a packing")
    return bytes(store.take(key, (None,), (torch.uint8,)).tolist()).decode("latin-1")


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    about, scheme = layer.details, layer.scheme
    n, k = about.n, about.k
    codes = _read_codes(store, name, about)
    fields = {}
    for part, field, dtypes in (
        ("scale", "scales", (scheme.scale_dtype,)),
        ("zero", "zeros", _FLOATS),
    ):
        key = f"{name}.{part}"
        if scheme.per_tensor:
            if store.nbytes(key) > 8:
                raise CheckpointError(f"{store.folder}: {key} must be one number")
            fields[field] = store.take(key, store.shape(key), dtypes).reshape(1, 1)
        else:
            flat = store.take(key, (about.rows, 1), dtypes).flatten()
            fields[field] = flat[block_of_groups(n, k, about.block or k)]
    bias = store.take_if_there(f"{name}.bias", (n,))
    return QuantizedWeight(scheme=scheme, codes=codes, bias=bias, **fields)


def _read_codes(store: Store, name: str, about: _About) -> Tensor:
    """uint8 [N, K]."""
    key, packing = f"{name}.{_CODES}", about.packing
    columns = about.n * about.k // about.rows
    packed = -(-about.rows // packing.each)
    dtypes = _FLOATS if about.as_floats else (packing.dtype,)
    stored = store.take(key, (packed, None), dtypes)
    if stored.nbytes != packed * columns * packing.dtype.itemsize:
        raise CheckpointError(
            f"{store.folder}: {key} has {stored.nbytes} bytes, and {about.rows} groups of "
            f"{columns} codes in {packing.bits} bits have "
            f"{packed * columns * packing.dtype.itemsize}"
        )
    words = stored.view(packing.dtype).view(packed, columns)
    mask = (1 << packing.bits) - 1
    planes = [((words >> shift) & mask).to(torch.uint8) for shift in packing.shifts]
    codes = torch.cat(planes)[: about.rows].reshape(about.n, about.k)
    if int(codes.max()) >= about.codes:
        raise CheckpointError(
            f"{store.folder}: {key} holds the code {int(codes.max())}, and there are {about.codes}"
        )
    return codes


HQQ = Format(
    name=NAME,
    title="of HQQ, groups with real zero points",
    why_not=only_read,
    detect=_detect,
    read_plan=_read_plan,
    read_layer=_read_layer,
)
