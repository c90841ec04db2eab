"""AWQ with the words of GEMV and of GEMV_FAST, which AutoAWQ and llm-awq write; read only.

GEMV       qweight       int32 [N, K/8]     4-bit codes, a bit stream along K
           qzeros        int32 [N, Z]       zero points, a bit stream along the groups
           scales        [N, 8Z]

GEMV_FAST  qweight       int16 [N/4, K]     4-bit codes, in the order of `qkernels/bits/awq.py`
           qzeros        [8Z, N]            -s*z, rounded to the type of the scales; scaled_zeros in
                                            llm-awq
           scales        [8Z, N]

Z = ceil(ceil(K/g / 8) / m) * m words hold the groups of a row, m = 1, 2, 4 for g >= 128, 64, 32;
what is beyond them is no number of the weight. So the group size stands in the config alone.

GEMV_FAST means q*s - s*z with the product rounded. Where no product was, zero points are integers.
Else the products themselves are kept, as `offsets`. Either way the weight is the same bit for bit.
Source: AutoAWQ (Casper Hansen, MIT licence) and llm-awq (Lin et al. 2023), read as documentation.
"""

from __future__ import annotations

import torch

from qkernels.bits import divide_awq_fast, unpack_awq_fast, unpack_dense
from qkernels.checkpoints.awq import why_not_awq
from qkernels.checkpoints.config import Config
from qkernels.checkpoints.format import Format, StoredLayer
from qkernels.checkpoints.packed_config import (
    AWQ_FAST,
    AWQ_GEMV,
    Settings,
    detects,
    layer_names,
    read_section,
)
from qkernels.checkpoints.packed_layers import (
    check_four_bits,
    matrix,
    needed_zeros,
    scheme_of,
    take,
    take_bias,
    take_scales,
)
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError, WeightError
from qkernels.weight import QuantizedWeight

_ZEROS = ("qzeros", "scaled_zeros")
_PARTS = ("qweight", *_ZEROS, "scales", "bias")
_MULTIPLES = {64: 2, 32: 4}


def _read_plan(config: Config, store: Store, rows_of_words: int) -> dict[str, StoredLayer]:
    """Args: rows_of_words: rows of the weight in a row of words."""
    section = read_section(config, store)
    layers = {}
    for name in layer_names(store, ("qweight", *_ZEROS)):
        said = section.of(name)
        check_four_bits(store, name, said)
        size = said.group_size
        if size is None:
            raise CheckpointError(
                f"{store.folder}: nothing says the group size of {name}, and its shapes do not: "
                "add a quant_config.json with w_bit, q_group_size, zero_point and version"
            )
        rows, words = matrix(store, f"{name}.qweight")
        k = words if rows_of_words > 1 else 8 * words
        groups = 1 if size < 1 else -(-k // size)
        scheme = scheme_of(store, name, said, 4, k, groups)
        parts = tuple(f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, parts, (said, rows_of_words * rows, k))
    return layers


def _zero_words(groups: int, size: int) -> int:
    words, multiple = -(-groups // 8), _MULTIPLES.get(size, 1)
    return -(-words // multiple) * multiple


def _read_gemv(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    said: Settings
    scheme, (said, n, k) = layer.scheme, layer.details
    groups = scheme.groups(k)
    width = _zero_words(groups, scheme.group_length(k))
    words = take(store, f"{name}.qzeros", (n, width), (torch.int32,), said)
    zeros = unpack_dense(words, 8 * width, 4)[:, :groups].contiguous()
    scales = take_scales(store, f"{name}.scales", (n, 8 * width), scheme, said)
    words = take(store, f"{name}.qweight", (n, k // 8), (torch.int32,), said)
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_dense(words, k, 4),
        scales=scales[:, :groups].contiguous(),
        zeros=needed_zeros(zeros, scheme, f"{store.folder}: {name}.qzeros"),
        bias=take_bias(store, name, n),
    )


def _read_fast(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    said: Settings
    scheme, (said, n, k) = layer.scheme, layer.details
    groups = scheme.groups(k)
    shape = (8 * _zero_words(groups, scheme.group_length(k)), n)
    if k % 64 or not k:
        raise CheckpointError(f"{store.folder}: {name} has {k} columns, no multiple of 64")
    key = f"{name}.scaled_zeros" if f"{name}.scaled_zeros" in store else f"{name}.qzeros"
    products = take_scales(store, key, shape, scheme, said)[:groups].t()
    scales = take_scales(store, f"{name}.scales", shape, scheme, said)[:groups].t().contiguous()
    words = take(store, f"{name}.qweight", (n // 4, k), (torch.int16,), said)
    try:
        zeros, offsets = divide_awq_fast(products, scales), None
    except WeightError as error:
        raise CheckpointError(f"{store.folder}: {key} holds {error}") from None
    if zeros is None and not scheme.symmetric:
        zeros, offsets = torch.zeros_like(scales, dtype=torch.uint8), products.contiguous()
    if zeros is None:
        raise CheckpointError(
            f"{store.folder}: {key} is no multiple of the scales, and the config says that the "
            "weights are symmetric"
        )
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_awq_fast(words),
        scales=scales,
        zeros=needed_zeros(zeros, scheme, f"{store.folder}: {key}"),
        offsets=offsets,
        bias=take_bias(store, name, n),
    )


AWQ_GEMV_ROW = Format(
    name=AWQ_GEMV,
    title="of AutoAWQ, with the words of GEMV",
    why_not=why_not_awq,
    detect=detects(AWQ_GEMV),
    read_plan=lambda config, store: _read_plan(config, store, 1),
    read_layer=_read_gemv,
)

AWQ_FAST_ROW = Format(
    name=AWQ_FAST,
    title="of AutoAWQ and llm-awq, with the words of GEMV_FAST",
    why_not=why_not_awq,
    detect=detects(AWQ_FAST),
    read_plan=lambda config, store: _read_plan(config, store, 4),
    read_layer=_read_fast,
)
