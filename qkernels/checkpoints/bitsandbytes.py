"""The format of bitsandbytes, as Transformers stores it: NF4, FP4 and LLM.int8().

4 bits   weight [(N*K + 1) // 2, 1]: bytes of the flat weight, the even element in the high bits;
             of another type where quant_storage says so, the same bytes
         weight.absmax fp32 [B], B blocks of the flat weight, which may begin and end within rows
         weight.quant_map fp32 [16], the values of the codes
         weight.quant_state.bitsandbytes__nf4 or __fp4: JSON of blocksize, shape, ...
         with double quantization absmax uint8 [B], weight.nested_absmax fp32 [ceil(B / 256)] and
             weight.nested_quant_map fp32 [256]; the offset stands in the JSON
8 bits   weight int8 [N, K], SCB fp32 [N]: w = weight * SCB / 127, and weight_format, 0 for rows

Where a block crosses rows, it becomes groups of as many columns as its size and K have in common,
each with the block's own scale; scales that were quantized twice are then kept in fp32, expanded
as bitsandbytes does it.

The package multiplies weight * SCB by fp32(1 / 127), which rounds twice, where one scale a row,
fp32(SCB / 127), rounds once: numbers of 8 bits agree to the last bit but one.

The threshold of LLM.int8() says which columns of x are multiplied in 16 bits. Weights are read for
16-bit activations, which is what it does for every column where all are above it.
Source: the bitsandbytes package (MIT), read as documentation.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qkernels.checkpoints.blocks import block_group, block_of_groups
from qkernels.checkpoints.config import Config, brief, only, quantization_of, strings, typed
from qkernels.checkpoints.format import Format, StoredLayer, only_read
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, SchemeError
from qkernels.fields import NESTED_BLOCK
from qkernels.scheme import WEIGHT_TYPES, QuantScheme, WeightType, table_type
from qkernels.weight import QuantizedWeight, codebook, nested_table

NAME = "bitsandbytes"

_KEYS = frozenset(
    (
        *("quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules"),
        # How layers compute, and in what type of bytes codes stand, which their tensors say.
        *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold"),
        *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    )
)
_STATE_KEYS = frozenset(
    (
        *("quant_type", "blocksize", "shape", "dtype"),
        *("nested_blocksize", "nested_dtype", "nested_offset"),
    )
)
_STATE = "weight.quant_state.bitsandbytes__"
_STATE_BYTES = 1 << 16
"""More than any JSON of a layer takes."""

_FOUR_BITS = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *(_STATE + "nf4", _STATE + "fp4"),
)
_EIGHT_BITS = ("SCB", "weight_format")
_BLOCK_SIZES = tuple(1 << power for power in range(5, 13))
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_EIGHT_BIT_LAYER = StoredLayer(QuantScheme(WEIGHT_TYPES["int8"], scale_dtype=torch.float32), ())


@dataclass(frozen=True)
class _FourBits:
    """What the JSON of a layer says."""

    n: int
    k: int
    block: int
    nested_block: int | None
    offset: float

    @property
    def blocks(self) -> int:
        return -(-self.n * self.k // self.block)


def _detect(config: Config, store: Store) -> bool:
    section = quantization_of(config) or {}
    # The first versions of Transformers that loaded in 8 bits named no method.
    unnamed = "quant_method" not in section
    return section.get("quant_method") == NAME or (
        unnamed and ("load_in_8bit" in section or "load_in_4bit" in section)
    )


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = quantization_of(config) or {}
    only(section, _KEYS, "quantization_config")
    skipped = set(strings(section.get("llm_int8_skip_modules") or [], "llm_int8_skip_modules"))
    layers: dict[str, StoredLayer] = {}
    for name, parts in _parts(store).items():
        if name in skipped:
            raise CheckpointError(
                f"{name} is quantized in the file, and llm_int8_skip_modules names it"
            )
        eight = any(part in _EIGHT_BITS for part in parts)
        _check_bits(section, name, 8 if eight else 4)
        layer = _EIGHT_BIT_LAYER if eight else _plan_four_bits(store, name, section)
        tensors = [f"{name}.{part}" for part in (*parts, "weight", "bias")]
        layers[name] = replace(layer, tensors=tuple(t for t in tensors if t in store))
    return layers


def _parts(store: Store) -> dict[str, list[str]]:
    """The tensors that none but a quantized layer has, by their layers."""
    found: dict[str, list[str]] = {}
    for key in store:
        for part in (*_FOUR_BITS, *_EIGHT_BITS):
            if key.endswith("." + part):
                found.setdefault(key[: -len(part) - 1], []).append(part)
    return found


def _check_bits(section: Config, name: str, bits: int) -> None:
    other = 12 - bits
    for key in (f"load_in_{other}bit", f"_load_in_{other}bit"):
        if section.get(key):
            raise CheckpointError(
                f"{name} is stored in {bits} bits, and quantization_config says {key}=true"
            )


def _plan_four_bits(store: Store, name: str, section: Config) -> StoredLayer:
    quant_type = next((t for t in ("nf4", "fp4") if f"{name}.{_STATE}{t}" in store), None)
    if quant_type is None:
        raise CheckpointError(
            f"{store.folder}: {name}.{_STATE}nf4 is missing: only weights that save_pretrained of "
            "Transformers stored quantized are read"
        )
    about = _read_state(store, name, quant_type)
    nested = about.nested_block is not None
    _check_said(section, "bnb_4bit_quant_type", quant_type, name)
    _check_said(section, "bnb_4bit_use_double_quant", nested, name)
    weight = _weight_type(store, f"{name}.weight.quant_map", quant_type)
    # Both the table and the blocks of the second level are those of the scheme.
    doubled = (
        about.k % about.block == 0
        and about.nested_block == NESTED_BLOCK
        and torch.equal(_nested_map(store, name), nested_table(torch.device("cpu")))
    )
    try:
        scheme = QuantScheme(
            weight,
            group_size=block_group(about.k, about.block),
            scale_dtype=torch.float32,
            scale_levels="double" if doubled else "one",
        )
    except SchemeError as error:
        raise CheckpointError(f"{store.folder}: {name}: {error}") from None
    return StoredLayer(scheme, (), about)


def _check_said(section: Config, key: str, value: object, name: str) -> None:
    if section.get(key, value) != value:
        raise CheckpointError(
            f"quantization_config says {key}={brief(section[key])}, and {name} is stored with "
            f"{brief(value)}"
        )


def _read_state(store: Store, name: str, quant_type: str) -> _FourBits:
    key = f"{name}.{_STATE}{quant_type}"
    where = f"{store.folder}: {key}"
    if store.nbytes(key) > _STATE_BYTES:
        raise CheckpointError(f"{where} is no JSON of a layer: it has {store.nbytes(key)} bytes")
    try:
        state = json.loads(bytes(store.take(key, (None,), (torch.uint8,)).tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from None
    state = typed(state, dict, where)
    only(state, _STATE_KEYS, where)
    if state.get("quant_type", quant_type) != quant_type:
        raise CheckpointError(f"{where} says quant_type={brief(state['quant_type'])}")
    sizes = typed(state.get("shape"), list, f"{where}: shape")
    if len(sizes) != 2:
        raise CheckpointError(f"{where}: shape must be [N, K], got {brief(sizes)}")
    n, k = (typed(size, int, f"{where}: shape") for size in sizes)
    if n < 1 or k < 1 or store.nbytes(f"{name}.weight") != (n * k + 1) // 2:
        raise CheckpointError(f"{where}: shape {brief(sizes)} does not fit the bytes of the weight")
    block = _block_size(state.get("blocksize"), f"{where}: blocksize")
    if "nested_blocksize" not in state:
        return _FourBits(n, k, block, None, 0.0)
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not _fits_float(offset):
        raise CheckpointError(f"{where}: nested_offset must be a number, got {brief(offset)}")
    nested = _block_size(state["nested_blocksize"], f"{where}: nested_blocksize")
    return _FourBits(n, k, block, nested, float(offset))


def _fits_float(value: float) -> bool:
    return abs(value) <= torch.finfo(torch.float32).max


def _block_size(value: object, where: str) -> int:
    size = typed(value, int, where)
    if size not in _BLOCK_SIZES:
        sizes = ", ".join(map(str, _BLOCK_SIZES))
        raise CheckpointError(f"{where} must be one of {sizes}, got {brief(size)}")
    return size


def _weight_type(store: Store, key: str, quant_type: str) -> WeightType:
    """The type with the values that are stored: our own where it has the same, else a table."""
    values = store.take(key, (16,), (torch.float32,))
    known = WEIGHT_TYPES[quant_type]
    if torch.equal(values, codebook(known)):
        return known
    try:
        return table_type(tuple(values.tolist()))
    except SchemeError as error:
        raise CheckpointError(f"{store.folder}: {key}: {error}") from None


def _nested_map(store: Store, name: str) -> Tensor:
    return store.take(f"{name}.weight.nested_quant_map", (256,), (torch.float32,))


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    if layer.details is None:
        return _read_eight_bits(store, name, layer)
    return _read_four_bits(store, name, layer, layer.details)


def _read_eight_bits(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    key = f"{name}.weight_format"
    if key in store and store.take(key, (), (torch.uint8,)) != 0:
        raise CheckpointError(
            f"{store.folder}: {key} says that the weight is stored for a GPU's tiles; only rows "
            "are read: load it with bitsandbytes and save it anew"
        )
    values = store.take(f"{name}.weight", (None, None), (torch.int8,))
    largest = store.take(f"{name}.SCB", (values.shape[0],), _FLOATS)
    if (largest < 0).any():
        raise CheckpointError(f"{store.folder}: {name}.SCB is negative, and it is the largest |w|")
    return QuantizedWeight(
        scheme=layer.scheme,
        codes=values.view(torch.uint8) + 128,
        scales=(largest.float() / 127)[:, None],
        bias=store.take_if_there(f"{name}.bias", (values.shape[0],)),
    )


def _read_four_bits(
    store: Store, name: str, layer: StoredLayer, about: _FourBits
) -> QuantizedWeight:
    n, k = about.n, about.k
    stored = store.take(f"{name}.weight", (None, 1), _STORAGE).view(torch.uint8).flatten()
    codes = torch.stack((stored >> 4, stored & 15), dim=1).flatten()[: n * k].view(n, k)
    fields = _scales(store, name, layer.scheme, about)
    return QuantizedWeight(
        scheme=layer.scheme,
        codes=codes.contiguous(),
        bias=store.take_if_there(f"{name}.bias", (n,)),
        **fields,
    )


def _scales(store: Store, name: str, scheme: QuantScheme, about: _FourBits) -> dict[str, Tensor]:
    key, groups = f"{name}.weight.absmax", block_of_groups(about.n, about.k, about.block)
    if about.nested_block is None:
        return {"scales": store.take(key, (about.blocks,), (torch.float32,))[groups]}
    absmax = store.take(key, (about.blocks,), (torch.uint8,))
    blocks = math.ceil(about.blocks / about.nested_block)
    nested = store.take(f"{name}.weight.nested_absmax", (blocks,), (torch.float32,))
    offset = torch.tensor(about.offset, dtype=torch.float32)
    if scheme.scale_levels == "double":
        return {"scales": absmax[groups], "nested_absmax": nested, "nested_offset": offset}
    of_block = nested[torch.arange(about.blocks) // about.nested_block]
    return {"scales": (_nested_map(store, name)[absmax.int()] * of_block + offset)[groups]}


BITSANDBYTES = Format(
    name=NAME,
    title="of bitsandbytes: NF4, FP4, LLM.int8()",
    why_not=only_read,
    detect=_detect,
    read_plan=_read_plan,
    read_layer=_read_layer,
)
