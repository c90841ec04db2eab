"""`save_model`: a model with quantized layers as a folder of any format that is written."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.atomic import new_folder
from qkernels.checkpoints.dense import Place, dense_places, quantized_layers, sharing
from qkernels.checkpoints.format import Format, WeightKind
from qkernels.checkpoints.kv_cache import KEY as KV_CACHE
from qkernels.checkpoints.kv_cache import KVCache, is_of_cache, kept
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.checkpoints.store import ShardWriter
from qkernels.checkpoints.table import check_holds, first_holding
from qkernels.checkpoints.ties import ties
from qkernels.checkpoints.written import WrittenNames, check_writes
from qkernels.errors import CheckpointError
from qkernels.modules.embedding import WQEmbedding
from qkernels.modules.experts import WQExperts
from qkernels.modules.foreign import foreign_layers, why_foreign
from qkernels.modules.heads import output_heads
from qkernels.modules.packed import PackedModule
from qkernels.modules.rows import whole_name
from qkernels.progress import Progress, silent
from qkernels.weight import QuantizedWeight

SHARD_SIZE = "5GB"
"""Of files of weights, where nobody says another."""


def save_model(
    model: Any,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    max_shard_size: int | str = SHARD_SIZE,
    progress: Progress = silent,
) -> None:
    """Writes a Transformers model whose linear layers are `WQLinear` to a new folder.

    The folder appears when all of it is written; until then, and if something fails, there is none.

    Args:
        model: a `transformers.PreTrainedModel`.
        folder: created where it is missing; must be empty.
        format: one of the formats that are written; `qkernels list formats` lists them. "qkernels"
            holds every scheme.
        max_shard_size: bytes of a file, or such as "5GB"; larger models get several and an index.
        progress: called as progress(done, total, layer name).

    Raises:
        CheckpointError: for a folder with files in it, an unknown format, or a weight that the
            format does not hold. Nothing is written then. Also for a full disk and the like.
    """
    plan, folder = SavePlan.of(model, format), Path(folder)
    if plan.left_out is not None:
        warnings.warn(plan.left_out, stacklevel=2)
    with as_written(folder), new_folder(folder) as aside:
        write_model(plan, aside, max_shard_size, progress)


def write_model(
    plan: SavePlan,
    folder: Path,
    max_shard_size: int | str = SHARD_SIZE,
    progress: Progress = silent,
) -> None:
    """Writes the files of a model to `folder`, which is there and holds none of them."""
    # The small files come first: what is wrong with them shows before the weights are written.
    for part in (plan.model, plan.model.config):
        # Code beside the model, which its config names.
        if getattr(part, "_auto_class", None) is not None:
            code = importlib.import_module("transformers.dynamic_module_utils")
            code.custom_object_save(part, folder, config=plan.model.config)
    (folder / "config.json").write_text(_config_text(plan.model, plan))
    if getattr(plan.model, "generation_config", None) is not None:
        # Without the checks of save_pretrained, which refuses what the model came with.
        plan.model.generation_config.to_json_file(folder / "generation_config.json")
    writer = ShardWriter(folder, max_shard_size)
    for name, tensor in plan.tensors(progress):
        writer.add(name, tensor)
    writer.finish()


@contextlib.contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Within, an error of the system becomes a CheckpointError that names `folder`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{folder} cannot be written: {reason}") from None


class HeldValues:
    """Where the numbers of a model are that is to be saved: in its own tensors."""

    def check(self, model: nn.Module) -> None:
        """Raises CheckpointError for a tensor whose numbers are not known, and for two that are one
        by the model's config and differ."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise CheckpointError(f"{name} is offloaded: move the model to one device to save")
        _check_ties(model)

    def kind(self, name: str, layer: PackedModule) -> WeightKind:
        """What a quantized layer is."""
        return WeightKind.of(layer.packed.parameters())

    def weight(self, name: str, layer: PackedModule) -> QuantizedWeight:
        """A quantized layer, with its bias."""
        return layer.to_weight()

    def tensor(self, name: str, place: Place) -> Tensor:
        """What is at a place outside of all quantized layers."""
        return place.tensor


@dataclass(frozen=True)
class SavePlan:
    """What a model is saved as, known before its tensors are.

    Attributes:
        row: the format, which holds all layers.
        layers: the quantized layers, by name.
        kinds: what the format must know of each that is stored, by its stored name.
        untied: config.json says that embeddings are not tied, and they were.
        cache: what the model remembers of a quantized KV cache.
        names: those that are stored, where they are not the model's.
        dense: the quantized embeddings that the format has no place for, by name: their rows are
            stored as they are looked up.
        values: where the numbers are.
    """

    model: Any
    row: Format
    layers: Mapping[str, PackedModule]
    kinds: Mapping[str, WeightKind]
    untied: bool
    cache: KVCache
    names: WrittenNames | None
    dense: Mapping[str, WQEmbedding]
    values: HeldValues

    @classmethod
    def of(cls, model: Any, format: str | None, values: HeldValues | None = None) -> SavePlan:
        """The plan of saving `model` in `format`; None chooses the first that holds all layers.

        Raises:
            CheckpointError: for what is no Transformers model, or one with adapters; where no layer
                is quantized, one is by another package, one is not held by `format`, a tensor is
                offloaded, or the config says that two are one which are not.
        """
        _check_model(model)
        values = values or HeldValues()
        layers = quantized_layers(model)
        for name, module in foreign_layers(model).items():
            raise CheckpointError(f"{why_foreign(name, module)}; formats hold no such layers")
        if not layers:
            raise CheckpointError("the model has no WQLinear layer: quantize it first")
        values.check(model)
        shared = sharing(layers)
        kinds = {
            name: _in_place(values.kind(name, layer), model, name, layer, shared.get(name))
            for name, layer in layers.items()
        }
        format = format or first_holding(kinds)
        dense = {} if check_holds(format, {}).embeddings else _embeddings(layers)
        layers = {name: layer for name, layer in layers.items() if name not in dense}
        kinds = {name: kind for name, kind in kinds.items() if name not in dense}
        if not layers:
            raise CheckpointError(
                f"{format} has no place for quantized embeddings, and no layer is quantized beside "
                "them: use the format qkernels"
            )
        row, names, stored = check_writes(format, model, kinds)
        heads = {id(head) for head in output_heads(model)}
        # A quantized head shares nothing with the embedding any more.
        quantized = any(id(layer) in heads for layer in layers.values())
        apart = bool(quantized or dense) and not row.head_beside_tie
        untied = apart and bool(_tying_sections(model.config.to_dict()))
        if untied and _asks_for_ties(model):
            raise CheckpointError(
                f"the code of {type(model).__name__} computes something else where embeddings are "
                f"not tied, and {row.name} cannot say that they are beside a quantized head: use "
                "the format qkernels, or leave the head alone"
            )
        if untied and dense and not quantized and _ties_anyway(model.config):
            raise CheckpointError(
                f"a {type(model.config).__name__} ties embeddings whatever config.json says, and "
                f"{row.name} has no place for a quantized one beside a head that is not: use the "
                "format qkernels, or quantize the head too"
            )
        return cls(model, row, layers, stored, untied, kept(model), names, dense, values)

    @property
    def left_out(self) -> str | None:
        """What the format has no place for, though the model comes with it, or None."""
        tensors = any(is_of_cache(name) for name in dense_places(self.model))
        left = []
        if not self.row.keeps_kv_cache and (self.cache or tensors):
            left.append(
                f"{self.row.name} has no place for the scales of a KV cache ({self.cache}), which "
                "are left out: readers will keep keys and values in 16 bits"
            )
        if self.dense:
            left.append(
                f"{self.row.name} has no place for quantized embeddings: the numbers of "
                f"{', '.join(self.dense)} are stored as {self.model.dtype}; the format qkernels "
                "holds them as they are"
            )
        return "; ".join(left) or None

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says under this name."""
        if self.names is not None:
            dense = self.names.dense(self.layers)
        else:
            dense = [
                name
                for name, module in self.model.named_modules(remove_duplicate=False)
                if isinstance(module, nn.Linear) and name not in self.layers
            ]
        assert self.row.write_config is not None
        section = self.row.write_config(self.kinds, dense)
        if self.row.keeps_kv_cache and self.cache.scheme:
            section[KV_CACHE] = self.cache.scheme
        return section

    def tensors(self, progress: Progress = silent) -> Iterator[tuple[str, Tensor]]:
        """Every tensor to store, by its name, one layer at a time."""
        with as_loaded(self.model) as changed:
            for name, tensor in self._tensors(progress):
                yield name, tensor.clone() if changed else tensor

    def _tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        assert self.row.write_layer is not None
        for number, (name, layer) in enumerate(self.layers.items()):
            progress(number, len(self.layers), name)
            if self.names is None and self.kinds[name].shares is not None:
                continue
            whole = self.values.weight(name, layer)
            weights = [(name, whole)] if self.names is None else self.names.weights(name, whole)
            for stored, weight in weights:
                for part, tensor in self.row.write_layer(weight).items():
                    yield f"{stored}.{part}", tensor
            del whole, weights, weight
            give_back_free_pages()
        for name, embedding in self.dense.items():
            yield from self._named(f"{name}.weight", embedding.dense_weight())
        progress(len(self.layers), len(self.layers), "")
        places, sources = dense_places(self.model), ties(self.model)
        if self.row.keeps_kv_cache:
            yield from self.cache.tensors.items()
        else:
            places = {name: place for name, place in places.items() if not is_of_cache(name)}
        seen: set[tuple[Any, ...]] = set()
        for name, place in places.items():
            # What the model's code ties when it is loaded is stored once, under its first name.
            source = places.get(sources.get(name, name), place)
            key = (*_identity(place.tensor), id(source.module), source.name)
            if self.untied or key not in seen:
                seen.add(key)
                yield from self._named(name, self.values.tensor(name, place))

    def _named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A tensor of the model under the names that it is stored by."""
        if self.names is None:
            yield name, tensor
        else:
            yield from self.names.tensors(name, tensor.detach()).items()


def _embeddings(layers: Mapping[str, PackedModule]) -> dict[str, WQEmbedding]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, WQEmbedding)}


def _asks_for_ties(model: nn.Module) -> bool:
    """Whether its forward depends on `tie_word_embeddings`, as that of T5's relatives does."""
    return "tie_word_embeddings" in inspect.getsource(type(model).forward)


def _ties_anyway(config: Any) -> bool:
    """Whether a config of this class says that embeddings are tied where its file says otherwise,
    as that of T5 does."""
    read = type(config).from_dict({**config.to_dict(), "tie_word_embeddings": False})
    return bool(read.tie_word_embeddings)


@contextlib.contextmanager
def as_loaded(model: nn.Module) -> Iterator[bool]:
    """Within, weights are as a model has them that was just loaded; gives whether that changes any.

    RWKV in Transformers divides some in place when it first runs for inference, and would divide
    them again.
    """
    scaled: list[Any] = [m for m in model.modules() if getattr(m, "layers_are_rescaled", False)]
    for module in scaled:
        training, module.training = module.training, True
        module._rescale_layers()
        module.training = training
    try:
        yield bool(scaled)
    finally:
        for module in scaled:
            module._rescale_layers()


def _check_model(model: Any) -> None:
    """Raises for what no reader would find its way in again."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise CheckpointError(
            f"a {type(model).__name__} is no model of Transformers: save the model that it holds"
        )
    adapted = next((n for n, m in model.named_modules() if hasattr(m, "adapter_layer_names")), None)
    if adapted is not None:
        raise CheckpointError(
            f"{adapted} has an adapter, which no format holds: save adapters by save_pretrained of "
            "PEFT, and the model from before they were put on"
        )


def _check_ties(model: nn.Module) -> None:
    places = dense_places(model)
    for name, source in ties(model).items():
        if name not in places or source not in places:
            continue
        first, second = places[source].tensor, places[name].tensor
        same = (first.shape, first.dtype, first.device) == (
            second.shape,
            second.dtype,
            second.device,
        )
        if first is not second and not (same and torch.equal(first, second)):
            raise CheckpointError(
                f"{source} and {name} are one tensor by the model's config, and differ: tie them "
                "by model.tie_weights(), or set config.tie_word_embeddings = False"
            )


def _in_place(
    kind: WeightKind, model: nn.Module, name: str, layer: PackedModule, shares: str | None
) -> WeightKind:
    """The kind of a weight at its place in a model."""
    of_experts = isinstance(model.get_submodule(whole_name(name).rpartition(".")[0]), WQExperts)
    instead_of = "an expert of a fused parameter" if of_experts else None
    if isinstance(layer, WQEmbedding):
        instead_of = "an embedding"
    elif getattr(layer, "transposed", False):
        instead_of = "a Conv1D"
    return replace(kind, instead_of=instead_of, shares=shares)


def _tying_sections(config: Mapping[str, Any]) -> list[str]:
    """The parts of a config.json that say that embeddings are tied, by name; "" for all of it."""
    sections = {"": config, **config}
    return [
        name
        for name, section in sections.items()
        if isinstance(section, Mapping) and section.get("tie_word_embeddings")
    ]


def _config_text(model: Any, plan: SavePlan) -> str:
    # As Transformers writes it: some models take no more from a file than they have in one.
    config = json.loads(model.config.to_json_string(use_diff=True))
    if plan.untied:
        for name in _tying_sections(model.config.to_dict()):
            section = config[name] if name else config
            section["tie_word_embeddings"] = False
    config["quantization_config"] = plan.quantization_config()
    # As Transformers does, which may have been told another type when the model was made.
    config["dtype"] = model.dtype
    config.pop(layer_types.KEY, None)
    others = layer_types.written(plan.layers, model.dtype)
    if others:
        config[layer_types.KEY] = others
    config["architectures"] = [type(model).__name__]
    text = json.dumps(config, indent=2, default=lambda value: str(value).removeprefix("torch."))
    return text + "\n"


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor; those without elements, or numbers, have no address."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
