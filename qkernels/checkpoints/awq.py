"""AWQ with the words of GEMM, which nearly all AWQ models have; AutoAWQ's, read by most stacks.

qweight  int32 [K, N/8]     4-bit codes, in the order of `qkernels/bits/awq.py`
qzeros   int32 [K/g, N/8]   zero points in the same order; 8 where the config says zero_point=false
scales   [K/g, N]
bias     [N]

All layers of a model are quantized alike. Source: AutoAWQ (Casper Hansen, MIT licence), read as
documentation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import pack_awq, unpack_awq
from qkernels.checkpoints.config import Config
from qkernels.checkpoints.exact import by_channel, with_integer_zeros
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind
from qkernels.checkpoints.packed_config import AWQ, Settings, detects, layer_names, read_section
from qkernels.checkpoints.packed_layers import (
    check_four_bits,
    matrix,
    needed_zeros,
    scheme_of,
    stored_zeros,
    take,
    take_bias,
    take_scales,
    why_not_integers,
)
from qkernels.checkpoints.store import Store
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

_SIGNS = ("qweight", "qzeros")
_PARTS = (*_SIGNS, "scales", "bias")


def why_not_awq(kind: WeightKind) -> str | None:
    """Why AWQ holds no such weight, or None."""
    if kind.instead_of is not None:
        return f"is read into nn.Linear alone, and this takes the place of {kind.instead_of}"
    reason = why_not_integers(kind, frozenset())
    if reason is not None:
        return reason
    if kind.scheme.bits != 4:
        return "has 4 bits alone"
    if kind.shape is None:
        return None
    n, k = kind.shape
    if n % 8:
        return f"fills words of 8 channels, and N is {n}"
    size = kind.scheme.group_length(k)
    if k % size:
        return f"has no groups of {size} where K is {k}: use a group size that divides K"
    return None


def _why_not_together(layers: Mapping[str, WeightKind]) -> str | None:
    alike = {(kind.scheme.group_size, kind.scheme.symmetric) for kind in layers.values()}
    if len(alike) > 1:
        schemes = sorted({str(kind.scheme) for kind in layers.values()})
        return f"quantizes all layers alike, and these are {', '.join(schemes)}"
    return None


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    section = read_section(config, store)
    layers = {}
    for name in layer_names(store, _SIGNS):
        said = section.of(name)
        check_four_bits(store, name, said)
        k, words = matrix(store, f"{name}.qweight")
        groups, _ = matrix(store, f"{name}.scales")
        scheme = scheme_of(store, name, said, 4, k, groups)
        parts = tuple(f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, parts, (said, 8 * words, k))
    return layers


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    said: Settings
    scheme, (said, n, k) = layer.scheme, layer.details
    groups = scheme.groups(k)
    words = take(store, f"{name}.qzeros", (groups, n // 8), (torch.int32,), said)
    zeros = unpack_awq(words).t().contiguous()
    scales = take_scales(store, f"{name}.scales", (groups, n), scheme, said)
    words = take(store, f"{name}.qweight", (k, n // 8), (torch.int32,), said)
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_awq(words).t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=needed_zeros(zeros, scheme, f"{store.folder}: {name}.qzeros"),
        bias=take_bias(store, name, n),
    )


def _write_layer(weight: QuantizedWeight) -> dict[str, Tensor]:
    weight = with_integer_zeros(by_channel(weight))
    tensors = {
        "qweight": pack_awq(weight.codes.t()),
        "qzeros": pack_awq(stored_zeros(weight).t()),
        "scales": weight.scales.t().contiguous(),
    }
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def _write_config(layers: Mapping[str, WeightKind], dense: Sequence[str]) -> dict[str, Any]:
    scheme: QuantScheme = next(iter(layers.values())).scheme
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "zero_point": not scheme.symmetric,
        "modules_to_not_convert": list(dense) or None,
    }


AWQ_GEMM = Format(
    name=AWQ,
    title="of AutoAWQ, with the words of GEMM; read by Transformers and vLLM",
    why_not=why_not_awq,
    why_not_together=_why_not_together,
    detect=detects(AWQ),
    read_plan=_read_plan,
    read_layer=_read_layer,
    write_layer=_write_layer,
    write_config=_write_config,
)
