"""Perplexity against torch's own cross-entropy; windows, generation, sizes, wrong requests."""

import math

import pytest
import torch
import torch.nn.functional as F

import qkernels as qk
from qkernels.errors import QuantizationError
from qkernels.models import evaluation
from tests.bounds import FROBENIUS_BOUND
from tests.tiny_model import VOCABULARY, tiny_model, tiny_tokenizer

BOUND = FROBENIUS_BOUND[torch.float32]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (333,), generator=torch.Generator().manual_seed(3))


def direct_perplexity(model, windows: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("window", [2, 64, 100, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_that_of_cross_entropy(model, tokens, window: int, batch: int):
    result = evaluation.perplexity(model, tokens, window=window, batch=batch)
    parts = [part for part in tokens.split(window) if len(part) > 1]
    assert result.windows == len(parts)
    assert result.tokens == sum(map(len, parts))
    assert result.total_tokens == len(tokens)
    assert result.perplexity == pytest.approx(direct_perplexity(model, parts), rel=BOUND)


def test_long_windows_are_summed_in_slices_without_losing_any(model, tokens):
    # 129 predictions are two slices of logits and one more.
    assert evaluation._LOGIT_ROWS * 2 + 1 == 129
    ids = tokens[:130][None]
    logits = torch.randn(1, 130, VOCABULARY)
    exact = F.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert float(evaluation._summed_loss(logits, ids)) == pytest.approx(float(exact), rel=BOUND)


def test_a_text_shorter_than_a_window_is_one_window(model, tokens):
    result = evaluation.perplexity(model, tokens[:5], window=64, max_windows=3)
    assert (result.windows, result.tokens) == (1, 5)


def test_sampled_windows_are_whole_and_evenly_spaced():
    windows = evaluation.windows_of(torch.arange(1050), 10, 5)
    assert [int(ids[0]) for ids in windows] == [100, 310, 520, 730, 940]
    assert all(len(ids) == 10 for ids in windows)
    assert len(evaluation.windows_of(torch.arange(1055), 10, None)) == 106
    # A last window of one token has nothing to predict.
    assert len(evaluation.windows_of(torch.arange(1051), 10, None)) == 105


def test_sampled_windows_measure_those_windows(model, tokens):
    result = evaluation.perplexity(model, tokens, window=50, max_windows=2)
    parts = evaluation.windows_of(tokens, 50, 2)
    assert (result.windows, result.tokens) == (2, 100)
    assert result.perplexity == pytest.approx(direct_perplexity(model, parts), rel=BOUND)


def test_progress_counts_windows_up_to_the_last(model, tokens):
    seen: list[tuple[int, int]] = []
    evaluation.perplexity(
        model, tokens, window=100, batch=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(0, 4), (2, 4), (3, 4), (4, 4)]


def test_nan_stays_visible(tokens):
    broken = tiny_model()
    broken.lm_head.weight.data[5, 5] = math.nan
    assert math.isnan(evaluation.perplexity(broken, tokens, window=64).perplexity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, "windows of 2 tokens"),
        ({"batch": 0}, "batch of 1"),
        ({"window": 129}, "windows of 129 tokens exceed the model's context, 128"),
        ({"max_windows": 0}, "number of windows must be 1 or more, got 0"),
        ({"token_ids": torch.tensor([7])}, r"2 tokens or more, got \[1\]"),
        ({"token_ids": torch.tensor([7, 128])}, "token id 128 is outside .* vocabulary of 128"),
    ],
)
def test_wrong_requests(model, tokens, changes: dict, message: str):
    request = {"token_ids": tokens, "window": 64} | changes
    with pytest.raises(QuantizationError, match=message):
        evaluation.perplexity(model, request.pop("token_ids"), **request)


def test_generation_is_greedy(model):
    result = evaluation.generate_text(
        model, tiny_tokenizer(), "Once upon", max_new_tokens=6, min_new_tokens=6
    )
    ids = [ord(c) for c in "Once upon"]
    with torch.no_grad():
        for _ in range(6):
            logits = model(torch.tensor([ids])).logits[0, -1]
            logits[2] = -math.inf  # min_new_tokens forbids the end token
            ids.append(int(logits.argmax()))
    assert result.text == "".join(map(chr, ids[9:])).strip()
    assert result.tokens == 6
    assert result.tokens_per_second == pytest.approx(6 / result.seconds)


def test_compiled_generation_is_timed_without_compiling(model, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluation, "prepare_decoding", lambda given: calls.append(given) or {})
    whole, lengths = model.generate, []

    def generate(ids, **options):
        out = whole(ids, **options)
        lengths.append(out.shape[1] - ids.shape[1])
        return out

    monkeypatch.setattr(model, "generate", generate)
    limits = {"max_new_tokens": 6, "min_new_tokens": 6}
    compiled = evaluation.generate_text(model, tiny_tokenizer(), "Once", **limits, compile=True)
    assert calls == [model] and lengths == [2, 6]
    assert compiled.compile_seconds > 0 and compiled.tokens == 6
    plain = evaluation.generate_text(model, tiny_tokenizer(), "Once", **limits)
    assert plain.text == compiled.text and plain.compile_seconds == 0 and lengths == [2, 6, 6]


def test_chat_goes_through_the_template(model):
    tokenizer = tiny_tokenizer()
    chat = evaluation.generate_text(model, tokenizer, "hi", max_new_tokens=8, chat=True)
    plain = evaluation.generate_text(model, tokenizer, "<hi>", max_new_tokens=8)
    assert chat.text == plain.text


def test_wrong_generation(model):
    tokenizer = tiny_tokenizer()
    with pytest.raises(QuantizationError, match="prompt is empty"):
        evaluation.generate_text(model, tokenizer, " \n")
    with pytest.raises(QuantizationError, match="max_new_tokens=0"):
        evaluation.generate_text(model, tokenizer, "a", max_new_tokens=0)
    with pytest.raises(QuantizationError, match="min_new_tokens=9"):
        evaluation.generate_text(model, tokenizer, "a", max_new_tokens=8, min_new_tokens=9)
    tokenizer.chat_template = None
    with pytest.raises(QuantizationError, match="no chat template"):
        evaluation.generate_text(model, tokenizer, "a", chat=True)


def test_weight_bytes_leave_out_the_output_head():
    model = tiny_model(torch.bfloat16)
    dense = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96) * 2
    assert evaluation.weight_bytes(model) == dense
    report = qk.quantize_model(model, "rtn", "w4a16-g32")
    assert evaluation.weight_bytes(model) == report.weight_bytes
    assert report.weight_bytes < dense / 3


def test_the_shipped_text_is_prose_of_the_promised_size():
    raw = evaluation.SHIPPED_TEXT.read_bytes()
    text = evaluation.read_text(evaluation.SHIPPED_TEXT)
    assert len(raw) > 150 * 1024
    assert text.startswith("Chapter 1\n\nSir Walter Elliot")
    assert "\r" not in text
    assert text.isascii()
    assert "Chapter 11\n" in text
    assert "Chapter 12" not in text


def test_unreadable_texts(tmp_path):
    for name, content, message in (
        ("empty", b" \n", "is empty"),
        ("latin", "café".encode("latin-1"), "not UTF-8 .byte 3."),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(QuantizationError, match=message):
            evaluation.read_text(tmp_path / name)
    with pytest.raises(QuantizationError, match=r"cannot read the text .*: No such file"):
        evaluation.read_text(tmp_path / "missing")
    with pytest.raises(QuantizationError, match=r"cannot read the text .*: Is a directory"):
        evaluation.read_text(tmp_path)


def test_encode_gives_every_character():
    assert evaluation.encode(tiny_tokenizer(), "a\nbé").tolist() == [97, 10, 98, 0]
