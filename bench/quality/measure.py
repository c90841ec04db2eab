"""One row, in a process of its own: quantizes the model and compares it with the dense one."""

from __future__ import annotations

import datetime
import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import load
from bench.quality import inputs, training
from bench.quality.record import Measured
from bench.quality.rows import LANGUAGE, Row
from qkernels import machine
from qkernels.models import calibration_batches, compare_encoders, compare_models, evaluation
from qkernels.models.calibration_text import needs_calibration
from qkernels.models.comparison import passages_of
from qkernels.modules import WQLinear
from qkernels.quantizers.model import quantize_model
from qkernels.quantizers.recipe import Recipe
from qkernels.quantizers.sensitivity import stored_bits
from qkernels.scheme import QuantScheme

_PASSAGE_TOKENS = 256
"""What all-MiniLM-L6-v2 is made for: its longest sentence."""


@dataclass(frozen=True)
class Settings:
    """What figures depend on beside the row and the commit.

    Attributes:
        windows, window: of each text: how many, and tokens of each.
        passages: paragraphs of each text that an encoder embeds.
        sequences, length: of calibration: how many, and tokens of each.
        threads: of torch; None is its own choice.
    """

    windows: int = 12
    window: int = 512
    passages: int = 100
    sequences: int = 128
    length: int = 512
    threads: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """With the texts, as a record keeps them."""
        texts = [*inputs.evaluation_texts(), inputs.calibration_text()]
        return asdict(self) | {text.name: text.digest for text in texts}


def blank(row: Row, settings: dict[str, Any]) -> Measured:
    """The row without figures."""
    head, dirty = machine.commit()
    return Measured(
        row.name,
        row.model,
        row.scheme,
        row.recipe,
        commit=head and (f"{head}+" if dirty else head),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        settings=settings,
        machine=machine.cpu_name(),
        versions=machine.versions(),
    )


def measure(row: Row, settings: Settings, path: Path) -> Measured:
    """Measures a row on the model at `path`."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    measured = blank(row, settings.as_dict())
    model, tokenizer = inputs.load(row.model, path)
    measured.dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    scheme = QuantScheme.parse(row.scheme)
    recipe = Recipe.parse(row.method, scheme)
    steps = int(row.training_steps)
    measured.calibrated = steps > 0 or needs_calibration(recipe, [scheme])
    batches = None
    if measured.calibrated:
        batches = calibration_batches(
            tokenizer, settings.sequences, settings.length, inputs.calibration_text().content
        )
    gc.collect()
    _forget_peak()
    measured.loaded_bytes = _memory("VmRSS")
    before, start = load.snapshot(), time.perf_counter()
    quantize_model(model, recipe, scheme, calibration=batches, observer=row.observer)
    if steps:
        assert batches is not None
        dense, _ = inputs.load(row.model, path)
        training.train(model, dense, batches, steps)
        del dense
    measured.seconds = time.perf_counter() - start
    measured.others_percent = load.others_percent(before, load.snapshot())
    measured.peak_bytes = _memory("VmHWM")
    measured.bits_per_weight = _bits_per_weight(model)
    # The dense model is read again: beside the quantization it would count as its memory.
    dense, _ = inputs.load(row.model, path)
    if row.model == LANGUAGE:
        measured.texts = _on_texts(dense, model, tokenizer, settings)
    else:
        measured.embeddings = _of_passages(dense, model, tokenizer, settings)
    return measured


def _bits_per_weight(model: nn.Module) -> float:
    """As checkpoints hold them: kernels fill 3 bits up to 4, and zero points up to bytes."""
    weights = [m.to_weight() for m in model.modules() if isinstance(m, WQLinear)]
    bits = sum(stored_bits(weight.parameters) for weight in weights)
    return bits / sum(weight.n * weight.k for weight in weights)


def _on_texts(
    dense: nn.Module, model: nn.Module, tokenizer: Any, settings: Settings
) -> dict[str, dict[str, float]]:
    found = {}
    for text in inputs.evaluation_texts():
        result = compare_models(
            dense,
            model,
            evaluation.encode(tokenizer, text.content),
            window=settings.window,
            max_windows=settings.windows,
        )
        found[text.name] = {
            "perplexity": result.perplexity,
            "dense_perplexity": result.dense_perplexity,
            "kl_divergence": result.kl_divergence,
            "top1_agreement": result.top1_agreement,
            "tokens": result.tokens,
        }
    return found


def _of_passages(
    dense: nn.Module, model: nn.Module, tokenizer: Any, settings: Settings
) -> dict[str, float]:
    passages = [
        passage
        for text in inputs.evaluation_texts()
        for passage in passages_of(
            tokenizer, text.content, longest=_PASSAGE_TOKENS, most=settings.passages
        )
    ]
    result = compare_encoders(dense, model, passages)
    return {
        "cosine": result.cosine,
        "least_cosine": result.least_cosine,
        "passages": result.passages,
        "tokens": result.tokens,
    }


def _forget_peak() -> None:
    """Begins the count of the process's largest memory anew, where the system lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _memory(key: str) -> int | None:
    """A figure of /proc/self/status in bytes, or None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{key}:")]
    return int(found[0][1]) * 1024 if found else None
