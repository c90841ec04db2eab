"""`save_model`: a model with quantized layers as a folder of any format that is written."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkernels.checkpoints import layer_types
from qkernels.checkpoints.atomic import new_folder
from qkernels.checkpoints.dense import dense_places
from qkernels.checkpoints.format import Format, WeightKind
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.checkpoints.store import ShardWriter
from qkernels.checkpoints.table import check_holds, first_holding
from qkernels.errors import CheckpointError
from qkernels.modules.experts import WQExperts
from qkernels.modules.heads import output_heads
from qkernels.modules.linear import WQLinear


def save_model(
    model: Any,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a Transformers model whose linear layers are `WQLinear` to a new folder.

    The folder appears when all of it is written; until then, and if something fails, there is none.

    Args:
        model: a `transformers.PreTrainedModel`.
        folder: created where it is missing; must be empty.
        format: one of the formats that are written; `qkernels formats` lists them. "qkernels" holds
            every scheme.
        max_shard_size: bytes of a file, or such as "5GB"; larger models get several and an index.

    Raises:
        CheckpointError: for a folder with files in it, an unknown format, or a weight that the
            format does not hold. Nothing is written then. Also for a full disk and the like.
    """
    plan, folder = SavePlan.of(model, format), Path(folder)
    with as_written(folder), new_folder(folder) as aside:
        write_model(plan, aside, max_shard_size)


def write_model(plan: SavePlan, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Writes the files of a model to `folder`, which is there and holds none of them."""
    # The small files come first: what is wrong with them shows before the weights are written.
    (folder / "config.json").write_text(_config_text(plan.model, plan))
    if getattr(plan.model, "generation_config", None) is not None:
        # Without the checks of save_pretrained, which refuses what the model came with.
        plan.model.generation_config.to_json_file(folder / "generation_config.json")
    writer = ShardWriter(folder, max_shard_size)
    for name, tensor in plan.tensors():
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


@dataclass(frozen=True)
class SavePlan:
    """What a model is saved as, known before its tensors are.

    Attributes:
        row: the format, which holds all layers.
        layers: the quantized layers, by name.
        kinds: what the format must know of each.
        untied: config.json says that embeddings are not tied, and they were.
    """

    model: Any
    row: Format
    layers: Mapping[str, WQLinear]
    kinds: Mapping[str, WeightKind]
    untied: bool

    @classmethod
    def of(cls, model: Any, format: str | None) -> SavePlan:
        """The plan of saving `model` in `format`; None chooses the first that holds all layers.

        Raises:
            CheckpointError: where no layer is quantized, one is not held by `format`, or a tensor
                is offloaded.
        """
        layers = quantized_layers(model)
        if not layers:
            raise CheckpointError("the model has no WQLinear layer: quantize it first")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                raise CheckpointError(f"{name} is offloaded: move the model to one device to save")
        kinds = {name: _kind(model, name, layer) for name, layer in layers.items()}
        row = check_holds(format or first_holding(kinds), kinds)
        heads = {id(head) for head in output_heads(model)}
        # A quantized head shares nothing with the embedding any more.
        apart = any(id(layer) in heads for layer in layers.values()) and not row.head_beside_tie
        untied = apart and any(tying_sections(model.config.to_dict()))
        if untied and _asks_for_ties(model):
            raise CheckpointError(
                f"the code of {type(model).__name__} computes something else where embeddings are "
                f"not tied, and {row.name} cannot say that they are beside a quantized head: use "
                "the format qkernels, or leave the head alone"
            )
        return cls(model, row, layers, kinds, untied)

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says under this name."""
        dense = [
            name
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear) and name not in self.layers
        ]
        assert self.row.write_config is not None
        return self.row.write_config(self.kinds, dense)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor to store, by its name, one layer at a time."""
        with as_loaded(self.model) as changed:
            for name, tensor in self._tensors():
                yield name, tensor.clone() if changed else tensor

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        assert self.row.write_layer is not None
        for name, layer in self.layers.items():
            for part, tensor in self.row.write_layer(layer.to_weight()).items():
                yield f"{name}.{part}", tensor
            give_back_free_pages()
        seen: set[tuple[Any, ...]] = set()
        for name, place in dense_places(self.model).items():
            # Tied weights are stored once, under the first of their names.
            key = _identity(place.tensor)
            if self.untied or key not in seen:
                seen.add(key)
                yield name, place.tensor


def _asks_for_ties(model: nn.Module) -> bool:
    """Whether its forward depends on `tie_word_embeddings`, as that of T5's relatives does."""
    return "tie_word_embeddings" in inspect.getsource(type(model).forward)


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


def quantized_layers(model: nn.Module) -> dict[str, WQLinear]:
    """The `WQLinear` layers of a model by name; one with several names is there under each."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, WQLinear)}


def _kind(model: nn.Module, name: str, layer: WQLinear) -> WeightKind:
    of_experts = isinstance(model.get_submodule(name.rpartition(".")[0]), WQExperts)
    instead_of = "an expert of a fused parameter" if of_experts else None
    if layer.transposed:
        instead_of = "a Conv1D"
    return replace(WeightKind.of(layer.packed.parameters()), instead_of=instead_of)


def tying_sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a config.json that say that embeddings are tied."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if section.get("tie_word_embeddings"):
            yield section


def _config_text(model: Any, plan: SavePlan) -> str:
    config = model.config.to_dict()
    if plan.untied:
        for section in tying_sections(config):
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
    """Equal for two names of one tensor; tensors without elements have no address."""
    if not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
