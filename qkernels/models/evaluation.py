"""What a model is worth: perplexity on a text, generated text, speed, bytes of its weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkernels.errors import QuantizationError
from qkernels.integrations.decoding import prepare_decoding
from qkernels.models.loading import output_head
from qkernels.modules import WQLinear
from qkernels.modules.kinds import is_linear_kind

T = TypeVar("T")

SHIPPED_TEXT = Path(__file__).parent / "data" / "persuasion.txt"
"""English prose in the public domain, to measure on; data/README.md says where it comes from."""

SHIPPED_CALIBRATION = Path(__file__).parent / "data" / "calibration.txt"
"""Text of other kinds, to calibrate on; see data/README.md."""

_LOGIT_ROWS = 64
"""Tokens whose logits are held in fp32 at a time: 12 MiB over a vocabulary of 49,152."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean natural-log loss over the predicted tokens; NaN where the model
            gives NaN.
        tokens: tokens of text in the windows that were run. The first of each window has nothing
            to be predicted from, so `tokens - windows` are predicted.
        total_tokens: tokens of the whole text.
    """

    perplexity: float
    tokens: int
    windows: int
    total_tokens: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.perplexity:.3f} over {self.tokens:,} of {self.total_tokens:,} tokens"


@dataclass(frozen=True)
class GenerationResult:
    """Generated text without its prompt, and how long it took, reading the prompt included.

    Attributes:
        compile_seconds: what `seconds` leaves out: compiling, where that was asked for.
    """

    text: str
    tokens: int
    seconds: float
    compile_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.inf


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        QuantizationError: for a file that is missing, a folder, empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise QuantizationError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise QuantizationError(
            f"the text {path} is not UTF-8 (byte {error.start}): convert it first"
        ) from None
    if not text.strip():
        raise QuantizationError(f"the text {path} is empty")
    return text


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text of any length: int64 [T]."""
    # The warning that a text exceeds the model's context does not apply: it is cut into windows.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def windows_of(token_ids: Tensor, window: int, most: int | None = None) -> list[Tensor]:
    """`token_ids` [T] cut into windows of `window` tokens that do not overlap.

    All of them, the shorter last one included, or `most` whole ones, evenly spaced over the text.
    """
    if most is not None and most < 1:
        raise QuantizationError(f"the number of windows must be 1 or more, got {most}")
    parts = [part for part in token_ids.split(window) if len(part) > 1]
    whole = [part for part in parts if len(part) == window]
    if most is None or most >= len(parts) or not whole:
        return parts
    return evenly_spaced(whole, most)


def evenly_spaced(items: Sequence[T], most: int | None = None) -> list[T]:
    """All of the items, or `most` of them where there are more."""
    if most is None or most >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    token_ids: Tensor,
    *,
    window: int = 512,
    batch: int = 1,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of a transformers causal language model over `token_ids`, window by window.

    Windows do not overlap and see nothing of each other. Losses are summed in float64.

    Args:
        model: `model(input_ids=[B, T]).logits` is [B, T, V].
        token_ids: int64 [T], on any device.
        window: tokens a window holds, 2 or more.
        batch: windows run at a time.
        max_windows: run this many windows, evenly spaced over the text, instead of all.
        progress: called as progress(done, total) in windows.

    Raises:
        QuantizationError: for fewer than two tokens, an id outside the vocabulary, or sizes that
            the model cannot take.
    """
    check_request(model, token_ids, window, batch)
    chosen = windows_of(token_ids, window, max_windows)
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    start, done = time.perf_counter(), 0
    for rows in batches_of(chosen, batch):
        if progress is not None:
            progress(done, len(chosen))
        rows = rows.to(device)
        loss += _summed_loss(model(input_ids=rows, use_cache=False).logits, rows)
        done += len(rows)
    if progress is not None:
        progress(done, len(chosen))
    tokens = sum(len(part) for part in chosen)
    mean = float(loss) / (tokens - len(chosen))
    return PerplexityResult(
        perplexity=math.exp(mean) if not mean > 700 else math.inf,
        tokens=tokens,
        windows=len(chosen),
        total_tokens=len(token_ids),
        seconds=time.perf_counter() - start,
    )


def generate_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    chat: bool = False,
    compile: bool = False,
) -> GenerationResult:
    """Continues `prompt`, or answers it as a chat message, greedily.

    Args:
        model: a transformers causal language model.
        min_new_tokens: go on past the end of the answer until so many; to time models alike.
        compile: ready the model by `prepare_decoding`, and compile it before it is timed.

    Raises:
        QuantizationError: for an empty prompt, limits that exclude each other, `chat` where the
            tokenizer has no chat template, or `compile` where it cannot be.
    """
    if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        raise QuantizationError(
            "generation needs 1 new token or more and no more at least than at most, got "
            f"min_new_tokens={min_new_tokens}, max_new_tokens={max_new_tokens}"
        )
    if not prompt.strip():
        raise QuantizationError("the prompt is empty")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise QuantizationError("this tokenizer has no chat template: generate without chat")
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    compiling = 0.0
    if compile:
        options |= prepare_decoding(model)
        # The cache has the size that it will have; the second token is the first of a step.
        _, compiling = _generate(
            model, inputs["input_ids"], **options, stopping_criteria=[_AfterTwo()]
        )
    new, seconds = _generate(model, inputs["input_ids"], **options)
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return GenerationResult(text, len(new), seconds, compiling)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of all linear layers but the output head, scales included."""
    head = output_head(model)
    total = 0
    for layer in model.modules():
        if layer is head:
            continue
        if isinstance(layer, WQLinear):
            total += layer.packed.nbytes
        elif is_linear_kind(layer):
            total += sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
    return total


def check_request(model: nn.Module, token_ids: Tensor, window: int, batch: int) -> None:
    """Raises QuantizationError where a model cannot read `token_ids` [T] in such windows."""
    if window < 2 or batch < 1:
        raise QuantizationError(
            f"this needs windows of 2 tokens or more and a batch of 1 or more, got {window} "
            f"and {batch}"
        )
    if token_ids.dim() != 1 or len(token_ids) < 2:
        raise QuantizationError(
            f"this needs a row of 2 tokens or more, got {list(token_ids.shape)}"
        )
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise QuantizationError(f"windows of {window} tokens exceed the model's context, {longest}")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(token_ids.max()) >= vocabulary:
        raise QuantizationError(
            f"token id {int(token_ids.max())} is outside the model's vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model"
        )


def batches_of(windows: list[Tensor], batch: int) -> Iterator[Tensor]:
    """Windows stacked [B, T], B up to `batch`, where all of a batch have the same length."""
    whole = [part for part in windows if len(part) == len(windows[0])]
    for start in range(0, len(whole), batch):
        yield torch.stack(whole[start : start + batch])
    for part in windows[len(whole) :]:
        yield part[None]


def _summed_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Sum of -log p(next token) over `rows` [B, T], from logits [B, T, V]: fp64 []."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for sequence, ids in zip(logits, rows, strict=True):
        for start in range(0, len(ids) - 1, _LOGIT_ROWS):
            targets = ids[start + 1 : start + 1 + _LOGIT_ROWS]
            scores = sequence[start : start + len(targets)].float()
            picked = scores.gather(1, targets[:, None]).squeeze(1)
            total += (scores.logsumexp(dim=1) - picked).sum(dtype=torch.float64)
    return total


class _AfterTwo:
    """Of `generate`: stops at the second token."""

    def __init__(self) -> None:
        self._tokens = 0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._tokens += 1
        return torch.full((len(ids),), self._tokens >= 2, device=ids.device)


def _generate(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, float]:
    """Greedily generated ids [T] without the prompt's, and the seconds it took."""
    ids = ids.to(next(model.parameters()).device)
    # generate() warns of a missing padding token, and of sampling options it does not use.
    pad = getattr(model.generation_config, "pad_token_id", None)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0 if pad is None else pad,
            **options,
        )
        # Copying to the CPU waits for the GPU.
        new = out[0, ids.shape[1] :].cpu()
    return new, time.perf_counter() - start
