"""The example of docs/backend.md runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qkernels as qk

PAGE = Path(__file__).parents[2] / "docs" / "backend.md"


def run_page(tmp_path, monkeypatch):
    """The names that the page's blocks define."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page"}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="models come from transformers")
    names = run_page(tmp_path, monkeypatch)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == [
        "out-awq",
        "out-compressed-tensors",
        "out-gptq",
        "out-gptq_v2",
        "out-qkernels",
    ]
    layers = [m for m in names["model"].modules() if isinstance(m, qk.WQLinear)]
    assert len(layers) == 7 and {str(layer.scheme) for layer in layers} == {"w4a16-g32"}
    linear = nn.Linear(64, 16)
    codes, scales, zeros = (t.float() for t in names["my_method"](linear.weight.detach()))
    wanted = (codes.unflatten(1, (-1, 32)) - zeros[..., None]) * scales[..., None]
    assert torch.equal(names["quantized"](linear).dequantize(), wanted.flatten(1))
    assert (wanted.flatten(1) - linear.weight).abs().max() <= scales.max()


def test_the_schemes_of_its_table_parse():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    spelled = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(spelled) > 10
    for text in spelled:
        if "..." in text:
            text = text.replace("...", ",".join(str(i / 8) for i in range(-7, 7)))
        qk.QuantScheme.parse(text)
