"""The example of docs/transformers.md runs as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import qkernels as qk
from tests.tiny_model import tiny_model

pytest.importorskip("transformers", reason="models come from transformers")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "transformers.md"


def test_the_example_runs(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "dense")
    shutil.copytree(ROOT / "tests" / "golden" / "gptq-4bit-g128-sym", tmp_path / "gptq")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    made, read = (names[name].model.layers[0].mlp for name in ("again", "model"))
    assert str(made.up_proj.scheme).startswith("w4a16-g32")
    assert str(made.down_proj.scheme).startswith("w8a16")
    assert isinstance(read.up_proj, qk.WQLinear) and read.up_proj.out_features == 128
