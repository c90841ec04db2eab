"""A row of the table of checkpoint formats, and what is told of weights to it and by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qkernels.checkpoints.config import Config, quant_method
from qkernels.checkpoints.exact import are_codes
from qkernels.checkpoints.store import Store
from qkernels.fields import FIELDS
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, WeightParameters

REAL_ZEROS = "has integer zero points alone, such as hqq(zeros=integer) makes"
"""Why a format does not hold zero points that are no integers."""


@dataclass(frozen=True)
class WeightKind:
    """What a format must know of a weight to say whether it holds it.

    Attributes:
        fields: the names of all hub fields that it has.
        shape: (N, K), or None where it is not known yet.
        real_zeros: its zero points are no integers of its bits.
        instead_of: what its layer takes the place of, as in "a Conv1D"; None for an nn.Linear.
        shares: the name of another layer whose weight it is, of an embedding; else None.
    """

    scheme: QuantScheme
    fields: frozenset[str]
    shape: tuple[int, int] | None = None
    real_zeros: bool = False
    instead_of: str | None = None
    shares: str | None = None

    @classmethod
    def of_scheme(cls, scheme: QuantScheme) -> WeightKind:
        """Any weight of `scheme` with no more than the fields that it must have."""
        return cls(scheme, frozenset(name for name in FIELDS if FIELDS[name].wanted(scheme)))

    @classmethod
    def of(cls, weight: WeightParameters) -> WeightKind:
        zeros = weight.fields.get("zeros")
        return cls(
            weight.scheme,
            frozenset(weight.fields),
            shape=(weight.n, weight.k),
            real_zeros=zeros is not None and not are_codes(zeros, weight.scheme.bits),
        )


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer of a folder, before it is read.

    Attributes:
        scheme: with the type of its scales.
        tensors: the names of all tensors that it is made of.
        details: what else the format has to remember for reading it.
        shares: the name of the layer whose weight it is, so that it has no tensors; else None.
    """

    scheme: QuantScheme
    tensors: tuple[str, ...]
    details: Any = None
    shares: str | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """A row of the table of formats.

    Attributes:
        name: as `quant_method` in config.json spells it.
        title: whose format it is and who reads it.
        why_not: why it cannot hold a weight, as what follows its name in a sentence, or None.
        why_not_together: why it cannot hold these layers, by name, in one model though it holds
            each; None for a format that holds them in any mixture.
        detect: (config.json, tensors) -> whether a folder is of this format.
        read_plan: (config.json, tensors) -> the quantized layers of a folder, by name. Reads no
            data of them.
        read_layer: (tensors, name, plan) -> one layer.
        write_layer: the tensors of a layer, by their names below the layer's; None for a format
            that is only read.
        write_config: (quantized layers, names of dense linear layers) -> quantization_config.
        keeps_kv_cache: has a place for the scheme and the scales of a KV cache in 8 bits.
        embeddings: its readers take quantized embeddings.
        idle_biases: its writers store biases of zeros for layers that have none.
        head_beside_tie: its readers take a quantized head in a model whose config says that the
            head's weight is the embedding's; else the config has to say otherwise.
        takes_stacks: its readers take experts of one parameter under the model's names; those of
            others want a module an expert.
    """

    name: str
    title: str
    why_not: Callable[[WeightKind], str | None]
    detect: Callable[[Config, Store], bool]
    read_plan: Callable[[Config, Store], dict[str, StoredLayer]]
    read_layer: Callable[[Store, str, StoredLayer], QuantizedWeight]
    write_layer: Callable[[QuantizedWeight], dict[str, Tensor]] | None = None
    write_config: Callable[[Mapping[str, WeightKind], Sequence[str]], dict[str, Any]] | None = None
    keeps_kv_cache: bool = False
    why_not_together: Callable[[Mapping[str, WeightKind]], str | None] | None = None
    embeddings: bool = False
    idle_biases: bool = False
    head_beside_tie: bool = False
    takes_stacks: bool = False

    def why_not_all(self, layers: Mapping[str, WeightKind]) -> str | None:
        """Why it cannot hold all layers in one model, or None."""
        reasons = (self.why_not(kind) for kind in layers.values())
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is not None or self.why_not_together is None:
            return reason
        return self.why_not_together(layers)

    @property
    def writes(self) -> bool:
        return self.write_layer is not None and self.write_config is not None


def says_method(name: str) -> Callable[[Config, Store], bool]:
    """Detects a format by the quant_method of its config.json."""
    return lambda config, store: quant_method(config) == name


def only_read(kind: WeightKind) -> str:
    """The `why_not` of a format that nothing is written in."""
    return "is only read"
