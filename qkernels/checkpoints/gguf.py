"""GGUF files of llama.cpp, whose blocks become weights as they are: nothing is quantized again.

The gguf package reads the file. Transformers knows which of its tensors is which of a model's, and
in what order rows of queries and keys lie; its code is asked for that by running it on numbers of
rows in place of weights. Layers of types that no scheme holds are dequantized and stay dense.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections.abc import Iterator
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
from qkernels.checkpoints.gguf_header import MAGIC, GgufTensor, read_header
from qkernels.checkpoints.limits import check_depth, parameters_on_meta
from qkernels.checkpoints.store import Store
from qkernels.checkpoints.ties import ties
from qkernels.errors import CheckpointError
from qkernels.modules.kinds import is_plain_embedding, is_plain_linear
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight

_DAMAGED = "cannot be read, it may be damaged or of an unsupported kind"
_HOLDS_FACTORS = "rope_freqs.weight"
"""Factors of long contexts, which Transformers does not apply."""


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that `path` is, or the one of a folder without config.json; or None.

    Raises:
        CheckpointError: where a folder without config.json holds several.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        found = sorted(path.glob("*.gguf"))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise CheckpointError(f"{path} holds several GGUF files ({names}): give one of them")
        path = found[0] if found else path
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return path if file.read(len(MAGIC)) == MAGIC else None


def has_quantized_tensors(path: Path) -> bool:
    """Whether a GGUF file holds matrices of types that schemes hold, by its header alone.

    Raises:
        CheckpointError: for a file that does not hold what its header says.
    """
    names = {_package("gguf").GGMLQuantizationType[name].value for name in GGUF_TYPES}
    return any(len(tensor.shape) >= 2 and tensor.kind in names for tensor in _header(path))


def _header(path: Path) -> list[GgufTensor]:
    sizes = _package("gguf").GGML_QUANT_SIZES
    return read_header(path, {kind.value: size for kind, size in sizes.items()})


@dataclass(frozen=True)
class _Source:
    """A tensor of the file, and what Transformers does with it.

    Attributes:
        tensor: as the gguf package reads it.
        shape: of the model's tensor.
        rows: int64 [N], the row of the file's matrix that is row n of the model's; None where
            the model's is no matrix of these rows.
    """

    tensor: Any
    shape: tuple[int, ...]
    rows: Tensor | None

    @property
    def kind(self) -> str:
        name: str = self.tensor.tensor_type.name
        return name


class GgufStore(Store):
    """The tensors of a GGUF file, under the names of the model of Transformers.

    Raises:
        CheckpointError: for packages that are missing, a file that they do not read, a model that
            Transformers does not know, and tensors that it has no place for.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.where = self.config_path = path
        self.metadata = {}
        gguf = _package("gguf")
        transformers, reading = _package("transformers"), _transformers_reading()
        tensors = len(_header(path))
        with as_checkpoint_error(path, _DAMAGED), gguf_read_once():
            reader = gguf.GGUFReader(path)
            config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            raw = json.loads(config.to_json_string(use_diff=False))
            check_depth(raw, tensors, path)
            with torch.device("meta"), parameters_on_meta(tensors):
                model = transformers.AutoModelForCausalLM.from_config(config)
            self._processor = self._processor_of(reading, reader, config)
            self._names = reading.get_gguf_hf_weights_map(model, self._processor)
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
        self._sources: dict[str, _Source] = {}
        for tensor in reader.tensors:
            if tensor.name not in self._names:
                raise CheckpointError(self._no_place(tensor.name, type(model).__name__))
            name = self._names[tensor.name]
            with as_checkpoint_error(path, _DAMAGED):
                self._sources[name] = self._source(tensor)

    def _processor_of(self, reading: Any, reader: Any, config: Any) -> Any:
        architecture = bytes(reader.fields["general.architecture"].parts[-1]).decode()
        kind = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
        return kind(config=config.to_dict())

    def _no_place(self, name: str, model: str) -> str:
        if name == _HOLDS_FACTORS:
            return (
                f"{self.config_path} holds {name}, factors of its position embedding that "
                "Transformers does not apply, so the model would be read wrongly"
            )
        return (
            f"{self.config_path} holds {name}, which has no place in a {model} of Transformers, "
            "or is shared out among experts there: not supported"
        )

    def _source(self, tensor: Any) -> _Source:
        import numpy as np

        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) == 2:
            # Numbers of rows, twice, with another number beside each.
            numbers = np.arange(shape[0] * 2, dtype=np.int64).reshape(-1, 2)
            found = self._process(numbers, tensor.name)
            if found.shape == numbers.shape and (found[:, 1] == found[:, 0] + 1).all():
                order = torch.from_numpy(found[:, 0] // 2)
                if torch.equal(order.sort().values, torch.arange(shape[0])):
                    return _Source(tensor, shape, order)
        made = self._process(np.zeros(shape, dtype=np.float32), tensor.name)
        return _Source(tensor, tuple(made.shape), None)

    def _process(self, values: Any, name: str) -> Any:
        parsed: dict[str, Any] = {"tensors": {}}
        result = self._processor.process(
            weights=values, name=name, tensor_key_mapping=self._names, parsed_parameters=parsed
        )
        if parsed["tensors"] or result.name != name:
            raise CheckpointError(self._no_place(name, "model"))
        return result.weights

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source_of(name).shape

    def nbytes(self, name: str) -> int:
        return int(self._source_of(name).tensor.n_bytes)

    def dtype(self, name: str) -> torch.dtype:
        self._source_of(name)
        return torch.float32

    def get(self, name: str) -> Tensor:
        """One tensor, dequantized, in memory of its own."""
        import numpy as np

        source, gguf = self._source_of(name), _package("gguf")
        with as_checkpoint_error(self.config_path, _DAMAGED):
            values = gguf.dequantize(source.tensor.data, source.tensor.tensor_type)
            made = self._process(values, source.tensor.name)
            return torch.from_numpy(np.array(made, dtype=np.float32))

    def layers(self) -> dict[str, str]:
        """The linear layers and embeddings whose blocks a scheme holds -> the name of its type."""
        found = {}
        for name, source in self._sources.items():
            layer = name.removesuffix(".weight")
            if layer != name and layer in self._linears and source.rows is not None:
                known = GGUF_TYPES.get(source.kind)
                if known is not None and source.shape[1] % known.size == 0:
                    found[layer] = source.kind
        return found

    def tied_heads(self) -> dict[str, str]:
        """The linear layers that the file does not hold -> the embedding whose weight they have."""
        return {
            head: source
            for head, source in self._ties.items()
            if head in self._linears and f"{head}.weight" not in self
        }

    def blocks(self, name: str) -> Tensor:
        """The blocks of a matrix, uint8 [N, blocks, bytes], in the model's order of rows."""
        import numpy as np

        source = self._source_of(name)
        assert source.rows is not None
        n, nbytes = source.shape[0], GGUF_TYPES[source.kind].nbytes
        raw = torch.from_numpy(np.array(source.tensor.data)).view(torch.uint8)
        return raw.reshape(n, -1, nbytes).index_select(0, source.rows)

    def _source_of(self, name: str) -> _Source:
        if name not in self._sources:
            raise CheckpointError(f"{self.config_path}: {name} is missing")
        return self._sources[name]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"loading a GGUF file needs {name} ({error}): pip install 'qkernels[models]'"
        ) from None


def _transformers_reading() -> Any:
    return _package("transformers.modeling_gguf_pytorch_utils")


@contextlib.contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within, a GGUF file is parsed once.

    transformers parses the whole file, vocabulary included, anew for each of configuration,
    weights and tokenizer, and builds the table of tensor names once a module: on one file of 98 MB
    18 s in all, 8 s with both remembered.
    """
    gguf = _package("gguf")
    with contextlib.ExitStack() as stack:
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
    for name, kind in store.layers().items():
        scheme = QuantScheme.parse(GGUF_TYPES[kind].scheme)
        tensors = (f"{name}.weight", f"{name}.bias")
        plan[name] = StoredLayer(scheme, tuple(t for t in tensors if t in store), kind)
    for head, embedding in store.tied_heads().items():
        if embedding in plan:
            # The head has the packed weight, and the embedding looks its rows up there.
            plan[head] = plan[embedding]
            plan[embedding] = StoredLayer(plan[head].scheme, (), shares=head)
    return plan


def _read_layer(store: Store, name: str, layer: StoredLayer) -> QuantizedWeight:
    assert isinstance(store, GgufStore)
    found = GGUF_TYPES[layer.details].decode(store.blocks(layer.tensors[0]))
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
