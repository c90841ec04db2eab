"""Loads a model and its tokenizer from a Hugging Face folder, a GGUF file or a folder of ours.

Nothing here touches the network: a model is a path on this machine, or an error says why not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from qkernels.errors import CheckpointError

_GGUF_MAGIC = b"GGUF"


def load_model_and_tokenizer(
    path: str | Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, Any]:
    """The model at `path`, quantized or not, in evaluation mode, and its tokenizer.

    Args:
        path: a Hugging Face folder, a folder written by `qkernels.save_model`, a `.gguf` file, or
            a folder with exactly one of those.
        dtype: of the layers that are not quantized.

    Raises:
        CheckpointError: for a path that is missing or holds no model, naming the path.
    """
    if not is_quantized_folder(path):
        return load_dense(path, dtype)
    import qkernels as qk

    _require_packages(gguf=False)
    with _quiet_transformers(), _as_checkpoint_error(path):
        model = qk.load_model(path)
        tokenizer = _tokenizer(Path(path), None)
    return model.to(dtype).eval(), tokenizer


def load_dense(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Any]:
    """The model at `path` with plain `nn.Linear` layers in `dtype`, and its tokenizer.

    A GGUF file is dequantized. Arguments as in `load_model_and_tokenizer`.

    Raises:
        CheckpointError: for a path that is missing, holds no model or a quantized one, for a
            damaged file, or where the packages that read it are not installed.
    """
    folder, gguf_file = _locate(Path(path))
    if is_quantized_folder(path):
        raise CheckpointError(f"{path} holds a quantized model: start from the original one")
    _require_packages(gguf=gguf_file is not None)
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
        # Versions that have this class keep the weights of some models packed unless told.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers(), _gguf_read_once(gguf_file), _as_checkpoint_error(path):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        tokenizer = _tokenizer(folder, gguf_file)
    _check_dense(model, path, transformers.__version__)
    return model.eval(), tokenizer


def is_quantized_folder(path: str | Path) -> bool:
    """Whether `path` is a model folder whose configuration says that its weights are quantized."""
    try:
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("quantization_config") is not None


def output_head(model: Any) -> nn.Module | None:
    """The layer that makes logits of a transformers model, or None where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


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
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file (it begins with {magic!r}): give a .gguf file or the "
            "folder that holds config.json"
        )
    return path.parent, path.name


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

    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    # GGUF files ask for a clean-up that takes spaces out before punctuation.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _check_dense(model: nn.Module, path: str | Path, version: str) -> None:
    head = output_head(model)
    if not any(isinstance(layer, nn.Linear) and layer is not head for layer in model.modules()):
        kinds = sorted({type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__})
        raise CheckpointError(
            f"{path} was loaded by transformers {version} without any nn.Linear layer "
            f"(found: {', '.join(kinds) or 'no linear layer'}), so there is nothing to quantize; "
            "for a GGUF file use transformers 5.17, which unpacks its weights"
        )


@contextlib.contextmanager
def _as_checkpoint_error(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    # A damaged file fails anywhere in three readers that are not ours, with any exception.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else "no reason given"
        raise CheckpointError(
            f"{path} cannot be loaded, it may be damaged or of an unsupported kind "
            f"({type(error).__name__}: {reason})"
        ) from error


@contextlib.contextmanager
def _gguf_read_once(gguf_file: str | None) -> Iterator[None]:
    """Within, a GGUF file is parsed once.

    transformers parses the whole file, vocabulary included, anew for each of configuration,
    weights and tokenizer, and builds the table of tensor names once a module: on one file of 98 MB
    18 s in all, 8 s with both remembered.
    """
    if gguf_file is None:
        yield
        return
    gguf = importlib.import_module("gguf")
    with contextlib.ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            remembered = functools.lru_cache(getattr(gguf, name))
            stack.enter_context(mock.patch.object(gguf, name, remembered))
        yield


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
