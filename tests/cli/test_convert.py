"""`qkernels convert`, as a user calls it."""

from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.cli.listing import formats_in_markdown
from tests.tiny_model import tiny_model, tiny_tokenizer, write_gguf

IDS = torch.arange(5, 21)[None]


def logits(folder):
    with torch.no_grad():
        return qk.load_model(folder)(IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, model = tmp_path_factory.mktemp("convert") / "model", tiny_model()
    qk.quantize_model(model, scheme="w4a16-g32")
    qk.save_model(model, path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "awq", "qkernels", "compressed-tensors"])
def test_there_and_back_gives_the_same_model(run, folder, tmp_path, to):
    code, text, err = run("convert", folder, "--to", to, "-o", tmp_path / "out")
    assert (code, err) == (0, "") and f"│ {to}" in text and "14 of w4a16-g32" in text
    assert torch.equal(logits(tmp_path / "out"), logits(folder))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert run("convert", tmp_path / "out", "-o", tmp_path / "back")[0] == 0
    assert torch.equal(logits(tmp_path / "back"), logits(folder))


def test_a_gguf_file_becomes_a_folder(run, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    code, _, _ = run("convert", file, "--to", "gptq", "-o", tmp_path / "out", "--dtype", "fp32")
    assert code == 0 and torch.equal(logits(tmp_path / "out"), logits(file))


def test_what_does_not_hold_the_weights_is_refused(run, folder, tmp_path):
    import gguf

    least = write_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q4_1)
    for arguments, reason in (
        ((folder, "--to", "gguf"), "gguf is only read"),
        ((folder, "--to", "exl2"), "'exl2' is not one of"),
        ((least, "--to", "gptq"), "offsets"),
        ((tmp_path / "nothing", "--to", "awq"), "does not exist"),
        ((folder, "--to", "awq", "--force"), "holds the model"),
    ):
        out = folder if "--force" in arguments else tmp_path / "out"
        code, text, err = run("convert", *arguments, "-o", out)
        assert code == 1 and text == "" and reason in err
        assert not (tmp_path / "out").exists()


def test_a_dense_model_is_to_be_quantized_first(run, model_folder, tmp_path):
    code, _, err = run("convert", model_folder, "-o", tmp_path / "out")
    assert code == 1 and "quantize it first" in err


def test_the_readme_lists_the_formats():
    readme = Path(__file__).parents[2] / "README.md"
    assert formats_in_markdown() in readme.read_text()
