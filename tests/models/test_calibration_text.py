"""Calibration batches: evenly spaced, whole, and the same each time."""

import pytest
import torch

from qkernels.errors import QuantizationError
from qkernels.models import calibration_batches, calibration_text
from qkernels.models.calibration_text import needs_calibration
from qkernels.quantizers.recipe import Recipe
from qkernels.scheme import QuantScheme
from tests.tiny_model import tiny_tokenizer

TEXT = "".join(chr(33 + i // 20) for i in range(20 * 50 + 7))
"""50 runs of 20 letters each, and a rest."""


def test_sequences_are_spread_over_the_whole_text():
    batches = calibration_batches(tiny_tokenizer(), 10, 20, TEXT, batch=4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 20), (4, 20), (2, 20)]
    rows = torch.cat(batches)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[33 + i] * 20 for i in range(2, 50, 5)]
    again = calibration_batches(tiny_tokenizer(), 10, 20, TEXT, batch=4)
    assert all(a.equal(b) for a, b in zip(batches, again, strict=True))


def test_by_default_they_are_eight_sequences_of_512():
    batches = calibration_batches(tiny_tokenizer(), text="a" * (512 * 140))
    assert [tuple(batch.shape) for batch in batches] == [(8, 512)] * 16


def test_a_short_text_gives_what_there_is():
    batches = calibration_batches(tiny_tokenizer(), 64, 20, TEXT)
    # The rest of 7 tokens is left out: it cannot be stacked with the others.
    assert sum(len(batch) for batch in batches) == 50
    (only,) = calibration_batches(tiny_tokenizer(), 64, 512, "It is.")
    assert only.tolist() == [[ord(c) for c in "It is."]]


def test_the_shipped_text_fills_most_of_the_sequences():
    # A token a character here; a tokenizer of words takes four characters a token.
    batches = calibration_batches(tiny_tokenizer(), length=2048)
    assert sum(len(batch) for batch in batches) == 128


def test_the_shipped_text_is_the_default(monkeypatch, tmp_path):
    file = tmp_path / "calibration.txt"
    file.write_text("It is.")
    monkeypatch.setattr(calibration_text, "SHIPPED_CALIBRATION", file)
    (only,) = calibration_batches(tiny_tokenizer())
    assert only.tolist() == [[ord(c) for c in "It is."]]


@pytest.mark.parametrize(
    ("recipe", "schemes", "needs"),
    [
        ("rtn", ["w4a16-g64"], False),
        ("gptq", ["w4a16-g64"], True),
        ("rtn", ["w4a16-g64", "w8a8-static"], True),
        ("rtn", ["w8a8-staticasym"], True),
        # Which is said later, of the layer that has it.
        ("hqq", ["nf4-g64"], False),
        ("hqq", ["nf4-g64", "w8a8-static"], True),
    ],
)
def test_what_needs_calibration(recipe, schemes, needs):
    parsed = [QuantScheme.parse(scheme) for scheme in schemes]
    assert needs_calibration(Recipe.parse(recipe), parsed) == needs


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sequences": 0}, "got 0, 512 and 8"),
        ({"length": 1}, "got 128, 1 and 8"),
        ({"batch": 0}, "got 128, 512 and 0"),
        ({"text": "a"}, "text has 1 tokens"),
    ],
)
def test_wrong_requests(request_, message):
    with pytest.raises(QuantizationError, match=message):
        calibration_batches(tiny_tokenizer(), **({"text": TEXT} | request_))
