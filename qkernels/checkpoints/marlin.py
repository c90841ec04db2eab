"""Marlin, as AutoGPTQ and AutoAWQ stored it; read only.

AutoGPTQ  AutoAWQ
B         qweight   int32 [K/16, 2N]   4-bit codes in tiles, `qkernels/bits/marlin.py`
s         scales    [K/g, N]           in an order of columns of their own
bias      bias      [N]
workspace           int32              for locks, holds nothing

All weights are symmetric: w = (q - 8) * s.
Source: Marlin (Frantar et al. 2024, Apache-2.0) and AutoAWQ (MIT), read as documentation.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qkernels.bits import marlin_scales, unpack_marlin
from qkernels.checkpoints.awq import why_not_awq
from qkernels.checkpoints.config import Config
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind
from qkernels.checkpoints.packed_config import (
    MARLIN,
    Settings,
    detects,
    layer_names,
    read_section,
)
from qkernels.checkpoints.packed_layers import (
    check_four_bits,
    matrix,
    scheme_of,
    take,
    take_bias,
    take_scales,
)
from qkernels.checkpoints.store import Store
from qkernels.errors import CheckpointError
from qkernels.weight import QuantizedWeight


def _why_not(kind: WeightKind) -> str | None:
    reason = why_not_awq(kind)
    return "has no zero points" if reason is None and not kind.scheme.symmetric else reason


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = read_section(config, store)
    layers = {}
    for name in layer_names(store, ("B", "qweight")):
        words, scales = ("B", "s") if f"{name}.B" in store else ("qweight", "scales")
        said = section.of(name)
        check_four_bits(store, name, said)
        if said.symmetric is False:
            raise CheckpointError(
                f"{store.folder}: {name} has no zero points, and the config says {said}"
            )
        tiles, width = matrix(store, f"{name}.{words}")
        groups, n = matrix(store, f"{name}.{scales}")
        k = 16 * tiles
        if width != 2 * n or n % 64:
            raise CheckpointError(
                f"{store.folder}: {name}.{words} must be [K/16, 2*N] with N a multiple of 64, got "
                f"{[tiles, width]}, and the scales have N = {n}"
            )
        symmetric = replace(said, symmetric=True)
        scheme = scheme_of(store, name, symmetric, 4, k, groups, scales=scales)
        parts = (words, scales, "bias", "workspace")
        tensors = tuple(f"{name}.{part}" for part in parts if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, tensors, (said, n, k, words, scales))
    return layers


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    said: Settings
    scheme, (said, n, k, words, scales) = layer.scheme, layer.details
    stored = take_scales(store, f"{name}.{scales}", (scheme.groups(k), n), scheme, said)
    codes = take(store, f"{name}.{words}", (k // 16, 2 * n), (torch.int32,), said)
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_marlin(codes),
        scales=marlin_scales(stored),
        bias=take_bias(store, name, n),
    )


MARLIN_ROW = Format(
    name=MARLIN,
    title="of AutoGPTQ and AutoAWQ, with the words of Marlin",
    why_not=_why_not,
    detect=detects(MARLIN),
    read_plan=_read_plan,
    read_layer=_read_layer,
)
