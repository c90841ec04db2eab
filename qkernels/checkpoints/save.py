"""`save_model`: a model with quantized layers as a folder of any format that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qkernels.checkpoints.atomic import new_folder
from qkernels.checkpoints.dense import dense_places
from qkernels.checkpoints.format import Format, WeightKind
from qkernels.checkpoints.memory import give_back_free_pages
from qkernels.checkpoints.store import ShardWriter
from qkernels.checkpoints.table import check_holds
from qkernels.errors import CheckpointError
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
            format does not hold. Nothing is written then.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, WQLinear)
    }
    if not layers:
        raise CheckpointError("the model has no WQLinear layer: quantize it first")
    kinds = {name: WeightKind.of(layer.packed.parameters()) for name, layer in layers.items()}
    row = check_holds(format, kinds)
    with new_folder(Path(folder)) as aside:
        # The small files come first: what is wrong with them shows before the weights are written.
        untied = _write_config(model, row, kinds, aside)
        if getattr(model, "generation_config", None) is not None:
            # Without the checks of save_pretrained, which refuses what the model came with.
            model.generation_config.to_json_file(aside / "generation_config.json")
        writer = ShardWriter(aside, max_shard_size)
        assert row.write_layer is not None
        for name, layer in layers.items():
            for part, tensor in row.write_layer(layer.to_weight()).items():
                writer.add(f"{name}.{part}", tensor)
            give_back_free_pages()
        seen: set[tuple[Any, ...]] = set()
        for name, place in dense_places(model).items():
            # Tied weights are stored once, under the first of their names.
            key = _identity(place.tensor)
            if untied or key not in seen:
                seen.add(key)
                writer.add(name, place.tensor)
        writer.finish()


def _write_config(model: Any, row: Format, kinds: dict[str, WeightKind], folder: Path) -> bool:
    """Writes config.json. Returns whether it says that embeddings are not tied, and they were."""
    dense = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, WQLinear)
    ]
    config = model.config.to_dict()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    tied = [section for section in sections if section.get("tie_word_embeddings")]
    # A quantized head shares nothing with the embedding any more.
    untied = bool(tied) and isinstance(head, WQLinear)
    if untied:
        for section in tied:
            section["tie_word_embeddings"] = False
    assert row.write_config is not None
    config["quantization_config"] = row.write_config(kinds, dense)
    config["architectures"] = [type(model).__name__]
    text = json.dumps(config, indent=2, default=lambda value: str(value).removeprefix("torch."))
    (folder / "config.json").write_text(text + "\n")
    return untied


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor; tensors without elements have no address."""
    if not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
