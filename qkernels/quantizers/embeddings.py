"""Embeddings of a model, quantized on their own or as the weight of an output head.

They lie before all blocks and need no statistics: whatever the recipe, a weight that no head has is
rounded to nearest, and one that a head has is the head's. All embeddings of one weight go together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from qkernels.checkpoints.format import WeightKind
from qkernels.errors import LayerError, SchemeError
from qkernels.modules.embedding import WQEmbedding, why_not_scheme
from qkernels.modules.linear import WQLinear
from qkernels.modules.packed import PackedModule
from qkernels.quantizers.report import LayerReport, compare
from qkernels.scheme import QuantScheme


@dataclass(frozen=True)
class SharedWeight:
    """A weight of embeddings that is to be quantized.

    Attributes:
        names: of the embeddings, in the model's order.
        head: the name of a linear layer of the same weight that is quantized too, or None.
    """

    names: tuple[str, ...]
    scheme: QuantScheme
    head: str | None


def shared_weights(
    chosen: Mapping[str, QuantScheme],
    embeddings: Mapping[str, int],
    layers: Mapping[str, QuantScheme],
    weights: Mapping[str, int],
) -> list[SharedWeight]:
    """The weights of the embeddings `chosen`.

    Args:
        chosen: embeddings asked for, by name, with their schemes.
        embeddings: every embedding that can be quantized -> the identity of its weight.
        layers: the linear layers to quantize, with their schemes.
        weights: each of these -> the identity of its weight.

    Raises:
        LayerError: where one weight is to have two schemes.
        SchemeError: for a scheme with quantized activations.
    """
    found = {}
    for name, scheme in chosen.items():
        reason = why_not_scheme(scheme)
        if reason is not None:
            raise SchemeError(f"{name} {reason}")
        weight = embeddings[name]
        heads = [head for head in layers if weights[head] == weight]
        beside = {**{head: layers[head] for head in heads}, **_sharing(weight, chosen, embeddings)}
        for other, its in beside.items():
            if its != scheme:
                raise LayerError(
                    f"{name} is to be {scheme} and {other} {its}, and they share one weight: give "
                    "both one scheme, or name one of them"
                )
        names = tuple(n for n in embeddings if embeddings[n] == weight)
        found[weight] = SharedWeight(names, scheme, heads[0] if heads else None)
    return list(found.values())


def _sharing(
    weight: int, chosen: Mapping[str, QuantScheme], embeddings: Mapping[str, int]
) -> dict[str, QuantScheme]:
    return {name: scheme for name, scheme in chosen.items() if embeddings[name] == weight}


def embedding_kinds(model: nn.Module, shared: Iterable[SharedWeight]) -> dict[str, WeightKind]:
    """What is known of the embeddings before they are quantized, by name."""
    kinds = {}
    for weight in shared:
        for name in weight.names:
            n, k = cast(nn.Embedding, model.get_submodule(name)).weight.shape
            kind = WeightKind.of_scheme(weight.scheme)
            kinds[name] = replace(kind, shape=(n, k), instead_of="an embedding")
    return kinds


class EmbeddingForms:
    """The quantized embeddings of a model, made before its layers are and put in place after them.

    Raises:
        WeightError: for weights that cannot be quantized.
    """

    def __init__(self, model: nn.Module, shared: Iterable[SharedWeight]) -> None:
        self._model = model
        self._shared = list(shared)
        self._before = {n: self._dense(n) for weight in self._shared for n in weight.names}
        self._made: dict[str, WQEmbedding] = {}
        self._reports: dict[str, LayerReport] = {}
        for weight in self._shared:
            if weight.head is None:
                first, dense = weight.names[0], self._before[weight.names[0]]
                made = WQEmbedding.from_embedding(dense, weight.scheme, name=first)
                self._made[first] = made
                self._reports[first] = compare(first, dense, made, None, "rtn")

    def put(self, layers: Mapping[str, LayerReport]) -> dict[str, LayerReport]:
        """Puts them in place, beside quantized layers, and reports what became of each.

        Args:
            layers: the reports of the layers.
        """
        reports: dict[str, LayerReport] = {}
        made: dict[int, WQEmbedding] = {}
        for weight in self._shared:
            source: PackedModule
            if weight.head is None:
                source = self._made[weight.names[0]]
                made[id(self._before[weight.names[0]])] = self._made[weight.names[0]]
                first = weight.names[0]
                report = self._reports[first]
            else:
                source = cast(WQLinear, self._model.get_submodule(weight.head))
                first, report = weight.head, layers[weight.head]
            for name in weight.names:
                before = self._before[name]
                if id(before) not in made:
                    made[id(before)] = WQEmbedding(source, dtype=before.weight.dtype)
                    made[id(before)].stand_in_for(before)
                self._model.set_submodule(name, made[id(before)])
                shares = None if name == first else first
                reports[name] = replace(report, name=name, output_error=None, shares=shares)
        return reports

    def _dense(self, name: str) -> nn.Embedding:
        return cast(nn.Embedding, self._model.get_submodule(name))
