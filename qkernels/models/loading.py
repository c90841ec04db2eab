"""Loads a model and its tokenizer from a Hugging Face folder, a GGUF file or a folder of ours.

Nothing here touches the network: a model is a path on this machine, or an error says why not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from qkernels.checkpoints import is_quantized, load_model
from qkernels.checkpoints.config import read_config
from qkernels.checkpoints.dense_folder import DenseFolder, check_tensors
from qkernels.checkpoints.foreign import as_checkpoint_error
from qkernels.checkpoints.gguf import GgufStore, gguf_read_once
from qkernels.checkpoints.gguf_header import MAGIC
from qkernels.errors import CheckpointError
from qkernels.modules.heads import output_heads
from qkernels.modules.kinds import is_linear_kind
from qkernels.progress import Progress, silent

_DAMAGED = "cannot be loaded, it may be damaged or of an unsupported kind"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt", "tekken.json"),
)
"""A folder without any of these holds no tokenizer."""


def load_model_and_tokenizer(
    path: str | Path,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: bool = True,
    progress: Progress = silent,
) -> tuple[nn.Module, Any]:
    """The model at `path`, quantized or not, in evaluation mode, and its tokenizer.

    Args:
        path: a Hugging Face folder, a folder written by `qkernels.save_model`, a `.gguf` file, or
            a folder with exactly one of those. Blocks of a GGUF file stay quantized as they are.
        dtype: of the layers that are not quantized; None is bf16, and what the folder of a
            quantized model was saved in.
        tokenizer: False loads the model alone, and None in place of the tokenizer.
        progress: called as progress(done, total, layer name) for a quantized model.

    Raises:
        CheckpointError: for a path that is missing or holds no model or no tokenizer, naming it.
    """
    if not is_quantized(path):
        return load_dense(path, dtype or torch.bfloat16, tokenizer=tokenizer)
    folder, gguf_file = _locate(Path(path))
    _require_packages(gguf=gguf_file is not None)
    if gguf_file is not None:
        # It does not say in which type its model is to run.
        dtype = dtype or torch.bfloat16
    with _quiet_transformers(), _read_once(gguf_file):
        # The tokenizer comes first: where it is missing, nobody has waited for the model.
        encoder = _tokenizer(folder, gguf_file) if tokenizer else None
        return load_model(path, dtype=dtype, progress=progress), encoder


def load_dense(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, *, tokenizer: bool = True
) -> tuple[nn.Module, Any]:
    """The model at `path` with plain layers in `dtype`, and its tokenizer.

    Of the class that the folder's config.json names, or else a causal language model. A GGUF file
    is dequantized. Arguments as in `load_model_and_tokenizer`.

    Raises:
        CheckpointError: for a path that is missing, holds no model or a quantized one, for a
            damaged file, for tensors that are missing, or where the packages that read it are not
            installed.

    Warns:
        UnusedTensorsWarning: for tensors that the model does not use.
    """
    folder, gguf_file = _locate(Path(path))
    if gguf_file is None and is_quantized(path):
        raise CheckpointError(f"{path} holds a quantized model: start from the original one")
    _require_packages(gguf=gguf_file is not None)
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
        # Versions that have this class keep the weights of some models packed unless told.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers(), _read_once(gguf_file):
        encoder = _tokenizer(folder, gguf_file) if tokenizer else None
        kind: Any = transformers.AutoModelForCausalLM
        if gguf_file is None:
            with as_checkpoint_error(path, _DAMAGED):
                kind = _model_class(folder) or kind
        else:
            # Transformers' own leaves out what scales positions, among others.
            options["config"] = GgufStore(folder / gguf_file).model_config
        with as_checkpoint_error(path, _DAMAGED):
            model, info = kind.from_pretrained(folder, **options, output_loading_info=True)
    check_tensors(model, path, info["missing_keys"], info["unexpected_keys"])
    if gguf_file is not None:
        _check_unpacked(model, path, transformers.__version__)
    return model.eval(), encoder


def open_dense(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    *,
    tokenizer: bool = True,
) -> tuple[DenseFolder, Any]:
    """What `load_dense` loads, with its weights left in the folder, and its tokenizer.

    Arguments and errors as there; GGUF files and pickles are refused.
    """
    folder, gguf_file = _locate(Path(path))
    _require_packages(gguf=False)
    with _quiet_transformers():
        encoder = _tokenizer(folder, None) if tokenizer and gguf_file is None else None
        return DenseFolder(path, dtype, device), encoder


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder or GGUF file at `path` holds a tokenizer."""
    folder, gguf_file = _locate(Path(path))
    return gguf_file is not None or any((folder / name).exists() for name in _TOKENIZER_FILES)


def require_causal(path: str | Path) -> None:
    """Raises CheckpointError where the model at `path` does not predict the next token of a text.

    Reads its config alone.
    """
    name = _not_causal(path)
    if name is not None:
        raise CheckpointError(
            f"{path} holds a {name}, which does not continue a text: this needs a causal language "
            "model"
        )


def is_causal(path: str | Path) -> bool:
    """Whether the model at `path` predicts the next token of a text; reads its config alone."""
    return _not_causal(path) is None


def _not_causal(path: str | Path) -> str | None:
    """The class of a model that does not continue a text, or None."""
    folder, gguf_file = _locate(Path(path))
    _require_packages(gguf=False)
    kind = None if gguf_file is not None else _model_class(folder)
    if kind is None:
        # It will be loaded as a causal language model or not at all.
        return None
    from transformers import AutoConfig

    with as_checkpoint_error(path, _DAMAGED):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    causal = kind.can_generate() and not getattr(config, "is_encoder_decoder", False)
    return None if causal else str(kind.__name__)


def output_head(model: Any) -> nn.Module | None:
    """The layer that makes logits of a transformers model, or None where there is none."""
    return next(iter(output_heads(model)), None)


def _locate(path: Path) -> tuple[Path, str | None]:
    """The folder to load from, and the name of the GGUF file in it or None."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: give a model folder or a .gguf file on this machine "
            "(nothing is downloaded)"
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return path, None
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise CheckpointError(
                f"{path} is no model folder: it needs a config.json, or exactly one .gguf file "
                f"(found: {names})"
            )
        path = found[0]
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file (it begins with {magic!r}): give a .gguf file or the "
            "folder that holds config.json"
        )
    return path.parent, path.name


def _read_once(gguf_file: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if gguf_file is None else gguf_read_once()


def _require_packages(*, gguf: bool) -> None:
    for name in ("transformers", "accelerate", *(("gguf",) if gguf else ())):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise CheckpointError(
                f"loading a model needs {name} ({error}): pip install 'qkernels[models]'"
            ) from None


def _tokenizer(folder: Path, gguf_file: str | None) -> Any:
    from transformers import AutoTokenizer

    if gguf_file is None and not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer: write it there by tokenizer.save_pretrained(folder)"
        )
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with as_checkpoint_error(folder / (gguf_file or ""), _DAMAGED):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    # GGUF files ask for a clean-up that takes spaces out before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _model_class(folder: Path) -> Any:
    """The class of Transformers that a folder's config.json names, or None."""
    import transformers

    named = read_config(folder).get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, first, None) if isinstance(first, str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else None


def _check_unpacked(model: nn.Module, path: str | Path, version: str) -> None:
    head = output_head(model)
    if not any(is_linear_kind(layer) and layer is not head for layer in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
        raise CheckpointError(
            f"{path} was loaded by transformers {version} without any nn.Linear layer "
            f"(found: {', '.join(kinds) or 'no linear layer'}), so there is nothing to quantize; "
            "use transformers 5.17, which unpacks the weights of GGUF files"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps the progress bars and the log of transformers out of our output; errors still raise."""
    tqdm = importlib.import_module("tqdm").tqdm
    from transformers.utils import logging as transformers_logging

    silent = functools.partialmethod(tqdm.__init__, disable=True)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with mock.patch.object(tqdm, "__init__", silent):
            yield
    finally:
        transformers_logging.set_verbosity(level)
