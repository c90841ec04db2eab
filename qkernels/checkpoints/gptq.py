"""GPTQ, as AutoGPTQ, GPTQModel, AutoRound and optimum write it and Transformers and vLLM read it.

qweight  int32 [K*b/32, N]           codes of b = 2, 3, 4 or 8 bits, a bit stream along K
qzeros   int32 [ceil(K/g), N*b/32]   zero points, a bit stream along N, symmetric ones as well
scales   [ceil(K/g), N]
g_idx    int32 [K]                   the group of each column; missing, or k // g, where columns
                                     are in the order of the weight
bias     [N]

gptq stores a zero point less one, gptq_v2 as it is. GPTQModel takes the one off the whole word,
others off each field (`qkernels/bits/gptq.py`); `meta.quantizer` says who wrote a file. Ours are
written and marked as GPTQModel's, which reads asymmetric weights of version 1 from no one else.
Other readers take a zero point of 0 in version 1 for something else; version 2 has no such doubt.

Scales have the type they were made in; GPTQModel takes them to fp16 when it loads.
Old files have a g_idx of zeros for weights that are in order. Groups by activations become a
permutation: their columns are sorted by g_idx.
Sources: GPTQ (Frantar et al. 2022), AutoGPTQ (MIT) and GPTQModel (Apache-2.0), read as
documentation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkernels.bits import dense_words, pack_gptq, pack_gptq_zeros, unpack_gptq, unpack_gptq_zeros
from qkernels.checkpoints.config import Config
from qkernels.checkpoints.exact import by_channel, with_integer_zeros
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind
from qkernels.checkpoints.packed_config import (
    GPTQ,
    GPTQ_V2,
    Settings,
    detects,
    layer_names,
    read_section,
)
from qkernels.checkpoints.packed_layers import (
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
from qkernels.errors import CheckpointError
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

_SIGNS = ("qweight", "qzeros", "g_idx")
_PARTS = (*_SIGNS, "scales", "bias")

_QUANTIZERS = ("qkernels", "gptqmodel:0.9.0")
"""What our files say of their writer: the second is the first version with words like these."""


@dataclass(frozen=True)
class _Details:
    """What else is known of a layer before it is read."""

    said: Settings
    n: int
    k: int
    less_one: str | None


def _why_not(kind: WeightKind) -> str | None:
    if kind.instead_of not in (None, "a Conv1D"):
        return f"is read into linear layers alone, and this takes the place of {kind.instead_of}"
    reason = why_not_integers(kind, frozenset(("perm",)))
    if reason is not None or kind.shape is None:
        return reason
    (n, k), scheme = kind.shape, kind.scheme
    for name, size in (("N", n), ("K", k)):
        if size * scheme.bits % 32:
            return f"fills words of 32 bits, and {name} is {size}"
    size = scheme.group_length(k)
    if k > size and k % size:
        return f"has no groups of {size} where K is {k}: use a group size that divides K"
    return None


def _read_plan(config: Config, store: Store, version: int) -> dict[str, StoredLayer]:
    section = read_section(config, store)
    less_one = None
    if version == 1:
        in_words = any(name.lower().startswith("gptqmodel:") for name in section.quantizers)
        less_one = "words" if in_words else "fields"
    layers = {}
    for name in layer_names(store, _SIGNS):
        said = section.of(name)
        rows, n = matrix(store, f"{name}.qweight")
        groups, zero_words = matrix(store, f"{name}.qzeros")
        bits = said.bits if said.bits is not None else 32 * zero_words // max(n, 1)
        if bits not in (2, 3, 4, 8):
            raise CheckpointError(
                f"{store.folder}: {name} has {bits} bits; 2, 3, 4 and 8 are supported"
            )
        k = 32 * rows // bits
        scheme = scheme_of(store, name, said, bits, k, groups, ragged=True)
        parts = tuple(f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in store)
        layers[name] = StoredLayer(scheme, parts, _Details(said, n, k, less_one))
    return layers


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    scheme, details = layer.scheme, layer.details
    said, n, k, bits = details.said, details.n, details.k, layer.scheme.bits
    groups = scheme.groups(k)
    rows, width = dense_words(k, bits), dense_words(n, bits)
    words = take(store, f"{name}.qzeros", (groups, width), (torch.int32,), said)
    zeros = unpack_gptq_zeros(words, n, bits, details.less_one)
    if said.bits is None and (zeros == (1 << bits - 1) + 1).all():
        raise CheckpointError(
            f"{store.folder}: {name}.qzeros are those of symmetric weights in gptq_v2, and no "
            "config says the version: add a quantize_config.json with bits, group_size, sym and "
            "checkpoint_format"
        )
    scales = take_scales(store, f"{name}.scales", (groups, n), scheme, said)
    words = take(store, f"{name}.qweight", (rows, n), (torch.int32,), said)
    perm = _read_perm(store, name, scheme, k, said)
    codes = unpack_gptq(words, k, bits)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes if perm is None else codes.index_select(1, perm),
        scales=scales.t().contiguous(),
        zeros=needed_zeros(zeros, scheme, f"{store.folder}: {name}.qzeros"),
        perm=perm,
        bias=take_bias(store, name, n),
    )


def _read_perm(
    store: Store, name: str, scheme: QuantScheme, k: int, said: Settings
) -> Tensor | None:
    """The columns of the weight, sorted by their groups; None where they are so already."""
    key, groups = f"{name}.g_idx", scheme.groups(k)
    if key not in store:
        if said.desc_act and groups > 1:
            raise CheckpointError(f"{store.folder}: {key} is missing, and the config says desc_act")
        return None
    index = take(store, key, (k,), (torch.int32, torch.int64), said).long()
    if k and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise CheckpointError(
            f"{store.folder}: {key} must be in 0..{groups - 1}, got {int(index.min())} to "
            f"{int(index.max())}"
        )
    in_order = torch.arange(k) // scheme.group_length(k)
    if torch.equal(index, in_order) or (not said.desc_act and not index.any()):
        return None
    if said.desc_act is False:
        raise CheckpointError(
            f"{store.folder}: {key} has columns out of order, and the config says desc_act=false: "
            "readers take them differently, so correct one of the two"
        )
    counts, wanted = index.bincount(minlength=groups), in_order.bincount(minlength=groups)
    if not torch.equal(counts, wanted):
        group = int((counts != wanted).nonzero()[0])
        raise CheckpointError(
            f"{store.folder}: {key} puts {int(counts[group])} columns into group {group}, which "
            f"has {int(wanted[group])}; the config says {said}"
        )
    return index.argsort(stable=True)


def _write_layer(weight: QuantizedWeight, less_one: str | None) -> dict[str, Tensor]:
    weight = with_integer_zeros(by_channel(weight))
    scheme, bits = weight.scheme, weight.scheme.bits
    codes = weight.codes
    index = torch.arange(weight.k, device=codes.device) // scheme.group_length(weight.k)
    if weight.perm is not None:
        back = weight.perm.argsort()
        codes, index = codes.index_select(1, back), index[back]
    tensors = {
        "qweight": pack_gptq(codes, bits),
        "qzeros": pack_gptq_zeros(stored_zeros(weight), bits, less_one),
        "scales": weight.scales.t().contiguous(),
        "g_idx": index.int(),
    }
    if weight.bias is not None:
        tensors["bias"] = weight.bias
    return tensors


def _write_config(
    layers: Mapping[str, WeightKind], dense: Sequence[str], version: str
) -> dict[str, Any]:
    said = {name: _said(kind.scheme) for name, kind in layers.items()}
    common = Counter(tuple(changes.items()) for changes in said.values()).most_common(1)[0][0]
    base = dict(common)
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": changes for name, changes in said.items() if changes != base
    }
    # A head is dense unless `lm_head` says otherwise.
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in dense if name != "lm_head"}
    section = {
        "quant_method": "gptq",
        **base,
        "desc_act": any("perm" in kind.fields for kind in layers.values()),
        "lm_head": "lm_head" in layers,
        "format": version,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": list(_QUANTIZERS)},
    }
    return {**section, "dynamic": dynamic} if dynamic else section


def _said(scheme: QuantScheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}


def _row(name: str, title: str, version: int) -> Format:
    return Format(
        name=name,
        title=title,
        why_not=_why_not,
        detect=detects(name),
        read_plan=partial(_read_plan, version=version),
        read_layer=_read_layer,
        write_layer=partial(_write_layer, less_one="words" if version == 1 else None),
        write_config=partial(_write_config, version=name),
        idle_biases=True,
    )


GPTQ_1 = _row(GPTQ, "of GPTQModel and AutoGPTQ; read by Transformers and vLLM", 1)
GPTQ_2 = _row(GPTQ_V2, "the same with zero points as they are; read by GPTQModel and vLLM", 2)
