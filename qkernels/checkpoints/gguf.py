"""GGUF files of llama.cpp, whose blocks become weights as they are: nothing is quantized again.

The gguf package reads the file. Transformers knows which of its tensors is which of a model's, and
in what order rows of queries and keys lie; its code is asked for that by running it on numbers of
rows in place of weights. Layers of types that no scheme holds are dequantized and stay dense.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from qkernels.bits.gguf import GGUF_TYPES
from qkernels.checkpoints.config import Config
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.format import Format, StoredLayer, WeightKind
from qkernels.checkpoints.gguf_config import FACTORS, complete_config, set_factors
from qkernels.checkpoints.gguf_file import DAMAGED, header, package
from qkernels.checkpoints.limits import check_depth, parameters_on_meta
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.ties import ties
from qkernels.errors import CheckpointError
from qkernels.modules.experts import expert_name, fused_experts
from qkernels.modules.kinds import is_conv1d, is_plain_embedding, is_plain_linear
from qkernels.modules.rows import part_name
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight


@dataclass(frozen=True)
class _Source:
    """A tensor of the file, and what Transformers does with it.

    Attributes:
        tensor: as the gguf package reads it.
        shape: of the model's tensor.
        rows: int64 [N], the row of the file's matrix that is row n of the model's; None where
            the model's is no matrix of these rows.
        first: of experts, the row of each of the model's that the file's first row is; else None.
    """

    tensor: Any
    shape: tuple[int, ...]
    rows: Tensor | None = None
    first: int | None = None

    @property
    def kind(self) -> str:
        name: str = self.tensor.tensor_type.name
        return name


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a layer are.

    Attributes:
        kind: the name of their type.
        tensor: the model's that they belong to.
        part: which of the file's tensors that this is made of.
        expert: which of its entries; None for all of it.
    """

    kind: str
    tensor: str
    part: int = 0
    expert: int | None = None


_HEAD, _OWN_HEAD = "output.weight", "lm_head.weight"
"""Transformers puts this one of GPT-2 in its place by itself."""


class GgufStore(Store):
    """The tensors of a GGUF file, under the names of the model of Transformers.

    Attributes:
        model_config: what the file says of the model, as a configuration of Transformers.

    Raises:
        CheckpointError: for packages that are missing, a file that they do not read, a model that
            Transformers does not know, and tensors that it has no place for.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self.metadata = path.parent, {}
        self.where = self.config_path = path
        count = len(header(path))
        gguf = package("gguf")
        transformers, reading = package("transformers"), _transformers_reading()
        with as_checkpoint_error(path, DAMAGED), gguf_read_once():
            reader = gguf.GGUFReader(path)
            config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            complete_config(config, self._said(reader), path)
            check_depth(json.loads(config.to_json_string(use_diff=False)), count, path)
            with torch.device("meta"), parameters_on_meta(count):
                model = transformers.AutoModelForCausalLM.from_config(config)
            self._processor = self._processor_of(reading, reader, config)
            self._names = reading.get_gguf_hf_weights_map(model, self._processor)
            factors = {t.name: t.data for t in reader.tensors if t.name in FACTORS}
            if factors:
                set_factors(config, model, factors, self._said(reader), path)
        self.model_config = config
        raw = json.loads(config.to_json_string(use_diff=False))
        self.config = {**raw, "architectures": [type(model).__name__]}
        self._linears = {
            name
            for name, module in model.named_modules()
            if is_plain_linear(module) or is_plain_embedding(module)
        }
        self._ties = {
            name.removesuffix(".weight"): source.removesuffix(".weight")
            for name, source in ties(model).items()
        }
        self._turned = {n for n, module in model.named_modules() if is_conv1d(module)}
        self._experts = {n: s for n, s in fused_experts(model).items() if not s.transposed}
        self._sources: dict[str, list[_Source]] = {}
        for tensor in reader.tensors:
            if tensor.name in factors:
                continue
            with as_checkpoint_error(path, DAMAGED):
                name, source = self._source(tensor, type(model).__name__)
            self._sources.setdefault(name, []).append(source)

    def _processor_of(self, reading: Any, reader: Any, config: Any) -> Any:
        kind = reading.TENSOR_PROCESSORS.get(_architecture(reader), reading.TensorProcessor)
        return kind(config=config.to_dict())

    def _said(self, reader: Any) -> Callable[[str], Any]:
        def said(key: str) -> Any:
            found = reader.fields.get(f"{_architecture(reader)}.{key}")
            return None if found is None else found.contents()

        return said

    def _source(self, tensor: Any, model: str) -> tuple[str, _Source]:
        """The model's tensor that one of the file is, or is a part of."""
        import numpy as np

        shape = tuple(int(size) for size in reversed(tensor.shape))
        made = self._numbered(tensor.name, shape) if len(shape) > 1 else None
        if made is not None:
            name, numbers, found = made
            turned = found.dim() == 2 and name.removesuffix(".weight") in self._turned
            rows = found.mT if turned else found
            if len(shape) == 2 and rows.shape == numbers.shape and _follow(rows):
                order = rows[:, 0] // rows.shape[1] - 1
                if torch.equal(order.sort().values, torch.arange(shape[0])):
                    return name, _Source(tensor, shape[::-1] if turned else shape, order)
            if len(shape) == 3 and found.dim() == 3 and len(found) == shape[0]:
                whole = (*found.shape[:2], shape[2])
                return name, _Source(tensor, whole, None, _first_row(found, numbers))
        placed = self._process({}, np.zeros(shape, dtype=np.float32), tensor.name)
        if placed is None:
            raise CheckpointError(
                f"{self.config_path} holds {tensor.name}, which has no place in a {model} of "
                "Transformers: not supported"
            )
        return placed[0], _Source(tensor, tuple(placed[1].shape))

    def _numbered(self, name: str, shape: tuple[int, ...]) -> tuple[str, Tensor, Tensor] | None:
        """The model's name of a matrix of the file; numbers in its place, W from W(n + 1) on in row
        n, so that none is 0, which stands for rows that another tensor fills; and what becomes of
        them."""
        rows = math.prod(shape[:-1])
        # Code that reshapes by sizes of the config needs all columns.
        for width in (2, shape[-1]):
            numbers = torch.arange(width, width + width * rows).view(*shape[:-1], width)
            with contextlib.suppress(ValueError):
                made = self._process({}, numbers.numpy(), name)
                return made and (made[0], numbers, torch.from_numpy(made[1].copy()))
        return None

    def _process(self, parsed: dict[str, Any], values: Any, name: str) -> tuple[str, Any] | None:
        """The model's name of a tensor, and what Transformers makes of it; None if it has no place.

        Args:
            parsed: what was made of others that are parts of the same; added to.
        """
        experts = name.removesuffix(".weight")
        if name not in self._names and experts not in self._names and name != _HEAD:
            return None
        result = self._processor.process(
            weights=values,
            name=name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": parsed},
        )
        if result.name is None:
            # The part is in its place among others.
            made = self._names.get(experts, _OWN_HEAD)
            return (made, parsed[made].numpy()) if made in parsed else None
        return (self._names[name], result.weights) if result.name == name in self._names else None

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source_of(name).shape

    def nbytes(self, name: str) -> int:
        return sum(int(source.tensor.n_bytes) for source in self._parts_of(name))

    def dtype(self, name: str) -> torch.dtype:
        self._source_of(name)
        return torch.float32

    def get(self, name: str) -> Tensor:
        """One tensor, dequantized, in memory of its own."""
        import numpy as np

        gguf, parsed, made = package("gguf"), dict[str, Any](), None
        with as_checkpoint_error(self.config_path, DAMAGED):
            for source in self._parts_of(name):
                values = gguf.dequantize(source.tensor.data, source.tensor.tensor_type)
                made = self._process(parsed, values, source.tensor.name)
            assert made is not None, name
            return torch.from_numpy(np.array(made[1], dtype=np.float32))

    def layers(self) -> dict[str, Blocks]:
        """The linear layers and embeddings whose blocks a scheme holds, those of experts one by
        one."""
        found = {}
        for name, sources in self._sources.items():
            layer = name.removesuffix(".weight")
            if any(not _held(source) for source in sources):
                continue
            if layer != name and layer in self._linears and sources[0].rows is not None:
                found[layer] = Blocks(sources[0].kind, name)
            elif name in self._experts and all(source.first is not None for source in sources):
                ordered = sorted(range(len(sources)), key=lambda i: sources[i].first or 0)
                for expert in range(sources[0].shape[0]):
                    whole = f"{name}.{expert_name(expert)}"
                    for number, i in enumerate(ordered):
                        # Rows of two tensors, such as those of gate and up.
                        part = whole if len(sources) == 1 else f"{whole}.{part_name(number)}"
                        found[part] = Blocks(sources[i].kind, name, i, expert)
        return found

    def tied_heads(self) -> dict[str, str]:
        """The linear layers that the file does not hold -> the embedding whose weight they have."""
        return {
            head: source
            for head, source in self._ties.items()
            if head in self._linears and f"{head}.weight" not in self
        }

    def blocks(self, layer: Blocks) -> Tensor:
        """The blocks of a layer, uint8 [N, blocks, bytes], in the model's order of rows."""
        import numpy as np

        source, nbytes = self._parts_of(layer.tensor)[layer.part], GGUF_TYPES[layer.kind].nbytes
        data = source.tensor.data
        raw = np.array(data if layer.expert is None else data[layer.expert])
        rows = raw.shape[0]
        blocks = torch.from_numpy(raw).view(torch.uint8).reshape(rows, -1, nbytes)
        return blocks if source.rows is None else blocks.index_select(0, source.rows)

    def _parts_of(self, name: str) -> list[_Source]:
        self._source_of(name)
        return self._sources[name]

    def _source_of(self, name: str) -> _Source:
        if name not in self._sources:
            raise CheckpointError(f"{self.config_path}: {name} is missing")
        return self._sources[name][0]


def _architecture(reader: Any) -> str:
    return bytes(reader.fields["general.architecture"].parts[-1]).decode()


def _held(source: _Source) -> bool:
    """Whether a scheme holds the blocks."""
    known = GGUF_TYPES.get(source.kind)
    return known is not None and int(source.tensor.shape[0]) % known.size == 0


def _follow(numbers: Tensor) -> bool:
    """Whether each row has numbers that follow each other from a multiple of their count on."""
    first, width = numbers[:, :1], numbers.shape[1]
    steps = torch.arange(width, dtype=numbers.dtype)
    return bool((first % width == 0).all() and (numbers == first + steps).all())


def _first_row(found: Tensor, numbers: Tensor) -> int | None:
    """Where the rows of each expert begin among those found, or None where they are not in order
    and alike."""
    filled = found[0, :, 0].nonzero().flatten()
    start, count = (int(filled[0]) if len(filled) else 0), numbers.shape[1]
    same = torch.equal(found[:, start : start + count], numbers)
    return start if same else None


def _transformers_reading() -> Any:
    return package("transformers.modeling_gguf_pytorch_utils")


_PATCHING = threading.Lock()
"""Two threads that both took the other's function for the package's would leave it there."""


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, a GGUF file is parsed once.

    transformers parses the whole file, vocabulary included, anew for each of configuration,
    weights and tokenizer, and builds the table of tensor names once a module: on one file of 98 MB
    18 s in all, 8 s with both remembered.
    """
    gguf = package("gguf")
    with contextlib.ExitStack() as stack:
        with _PATCHING:
            for name in ("GGUFReader", "get_tensor_name_map"):
                if not hasattr(getattr(gguf, name), "cache_info"):
                    remembered = functools.lru_cache(getattr(gguf, name))
                    stack.enter_context(mock.patch.object(gguf, name, remembered))
        yield


def _why_not(kind: WeightKind) -> str | None:
    integers = kind.scheme.weight.kind == "linear" and kind.scheme.weight_only
    return None if integers else "has blocks of integers alone, without quantized activations"


def _detect(config: Config, store: Store) -> bool:
    return isinstance(store, GgufStore)


def _read_plan(config: Config, store: Store) -> dict[str, StoredLayer]:
    assert isinstance(store, GgufStore)
    plan = {}
    for name, blocks in store.layers().items():
        scheme = QuantScheme.parse(GGUF_TYPES[blocks.kind].scheme)
        tensors = (blocks.tensor, f"{name}.bias")
        plan[name] = StoredLayer(scheme, tuple(t for t in tensors if t in store), blocks)
    for head, embedding in store.tied_heads().items():
        if embedding in plan:
            # The head has the packed weight, and the embedding looks its rows up there.
            plan[head] = plan[embedding]
            plan[embedding] = StoredLayer(plan[head].scheme, (), shares=head)
    return plan


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    assert isinstance(store, GgufStore)
    found = GGUF_TYPES[layer.details.kind].decode(store.blocks(layer.details))
    zeros = None
    if not layer.scheme.symmetric:
        zeros = torch.zeros(found.scales.shape, dtype=torch.uint8)
    return QuantizedWeight(
        scheme=layer.scheme,
        codes=found.codes,
        scales=found.scales,
        zeros=zeros,
        offsets=found.offsets,
        bias=store.get(f"{name}.bias") if f"{name}.bias" in layer.tensors else None,
    )


GGUF = Format(
    name="gguf",
    title="of llama.cpp",
    why_not=_why_not,
    detect=_detect,
    read_plan=_read_plan,
    read_layer=_read_layer,
)
