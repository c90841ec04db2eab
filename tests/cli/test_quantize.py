"""`qkernels quantize`: what it writes, and that nothing half-written or overwritten remains."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qkernels as qk
from qkernels.cli.quantize import print_report, replaced_folder
from qkernels.errors import QuantizationError
from qkernels.models.loading import load_dense, load_model_and_tokenizer
from qkernels.quantizers.resume import ResumeFolder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_the_folder_holds_the_quantized_model(run, model_folder, tmp_path):
    out = tmp_path / "out"
    code, text, err = run("quantize", model_folder, "--scheme", "w4a16-g32-sym", "-o", out)
    assert (code, err) == (0, "")
    assert "14 (w4a16-g32-sym)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model, tokenizer = load_model_and_tokenizer(out)
    # What Transformers keeps in fp32, such as the frequencies of rotary embeddings, stays so.
    expected, _ = load_dense(model_folder, torch.bfloat16)
    qk.quantize_model(expected, "rtn", "w4a16-g32-sym")
    ids = torch.tensor([tokenizer("It is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_the_other_commands_take_the_folder(run, model_folder, text_file, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", model_folder, "--scheme", "w8a16-sym", "-o", out)[0] == 0
    code, text, _ = run("inspect", out)
    assert code == 0
    assert text.count("w8a16-sym") == 7
    code, text, _ = run("eval", out, "--text", text_file, "--window", 64, "--windows", 1)
    assert code == 0
    assert "w8a16-sym" in text
    code, _, err = run("generate", out, "-p", "a", "--max-new-tokens", 1)
    assert code == 0
    assert "w8a16-sym" in err
    code, _, err = run("quantize", out, "--scheme", "w8a16-sym", "-o", tmp_path / "again")
    assert code == 1
    assert "quantized model: start from the original" in err


def test_our_own_format_holds_every_scheme(run, model_folder, tmp_path):
    arguments = ("quantize", model_folder, "--scheme", "nf4-g32-dq", "-o", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 1
    assert "compressed-tensors has no nf4 codebooks; formats that hold it: qkernels" in err
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--format", "qkernels")[0] == 0
    code, text, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert text.count("nf4-g32-dq") == 7


def test_layers_that_the_format_does_not_hold_stop_it_before_the_work(
    run, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("qkernels.quantizers.model.drive", lambda *a: pytest.fail("quantizes"))
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g24", "-o", tmp_path / "out")
    code, _, err = run(*arguments)
    assert code == 1
    assert "q_proj is w4a16-g24, and compressed-tensors reads no groups of 24 where K is 64" in err
    assert "use a group size that divides K; formats that hold it: qkernels" in err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert run(*arguments, "--format", "qkernels")[0] == 0


def test_patterns_choose_layers_and_schemes(run, model_folder, text_file, tmp_path):
    code, text, _ = run(
        *("quantize", model_folder, "--scheme", "w4a16-g32-sym", "-o", tmp_path / "out"),
        *("--include", "*.mlp.*", "--include", "*.q_proj", "--exclude", "*.1.mlp.up_proj"),
        *("--override", "*.down_proj=w8a16-sym", "--override", "*.q_proj=none"),
        *("--calibration", text_file),
    )
    assert code == 0
    assert "5 (w4a16-g32-sym, w8a16-sym)" in text
    assert "relative output error" in text
    code, text, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert text.count("w8a16-sym") == 1


def test_a_run_that_was_interrupted_goes_on(run, model_folder, text_file, tmp_path, monkeypatch):
    arguments = ("quantize", model_folder, "--scheme", "w8a8-static", "--calibration", text_file)
    assert run(*arguments, "-o", tmp_path / "expected")[0] == 0
    again = (*arguments, "-o", tmp_path / "out", "--resume", tmp_path / "work")
    real, stored = ResumeFolder.save, []

    def save(self, number, block):
        if number in interrupted:
            raise KeyboardInterrupt
        stored.append(number)
        real(self, number, block)

    monkeypatch.setattr(ResumeFolder, "save", save)
    interrupted = {1}
    code, _, err = run(*again)
    assert (code, err) == (130, "qkernels: interrupted\n")
    assert not (tmp_path / "out").exists()
    interrupted.clear()
    assert run(*again)[0] == 0
    assert stored == [0, 1]
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    code, _, err = run(*again, "--force", "--override", "*.down_proj=none")
    assert code == 1 and "differs in the schemes of layers" in err


def test_the_report_says_what_calibration_did_not_reach(capsys):
    layer = qk.LayerReport("up", "w8a8", 4, 4, 0.1, None, 8.0)
    report = qk.QuantizationReport("a(x=1)+rtn", [layer])
    report.unreached["up"] = "rounded to nearest"
    print_report(replace(report, whole_model="blocks.0 is called more than once"), 64, Path("out"))
    text = capsys.readouterr().out
    for what, value in (
        ("method", "a(x=1)+rtn"),
        ("not reached by calibration", "1 layers, such as up: rounded to nearest"),
        ("calibrated slowly", "not block by block: blocks.0 is called more than once"),
    ):
        assert re.search(rf"│ {what} +│ {re.escape(value)}", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "w5"), "scheme 'w5' does not parse"),
        (("--override", "x"), "--override 'x' is not PATTERN=SCHEME"),
        (("--override", "*=w5"), "scheme 'w5' does not parse"),
        (("--include", "nope"), "pattern 'nope' matches none of the 15 linear layers"),
        (("--exclude", "*"), "no linear layer is left"),
        (("--format", "gguf"), "format 'gguf' is not one of compressed-tensors, qkernels"),
        (("--method", "magic"), "method 'magic' is not one of"),
        (("--calibration", "missing.txt"), "cannot read the text missing.txt"),
        (("--scheme", "w8a8-static"), "pass calibration"),
    ],
)
def test_wrong_options_write_nothing(run, model_folder, tmp_path, options, message: str):
    arguments = ("quantize", model_folder, "--scheme", "w8a16-sym", "-o", tmp_path / "out")
    code, out, err = run(*arguments, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_and_a_missing_parent(run, model_folder, tmp_path):
    arguments = ("--scheme", "w8a16-sym", "-o")
    code, _, err = run("quantize", tmp_path / "gone", *arguments, tmp_path / "out")
    assert code == 1
    assert "gone does not exist" in err
    code, _, err = run("quantize", model_folder, *arguments, tmp_path / "a" / "out")
    assert code == 1
    assert "does not exist: make it" in err


def test_an_existing_output_needs_force(run, model_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("quantize", model_folder, "-o", out, "--scheme")
    assert run(*arguments, "w8a16-sym")[0] == 0
    before = contents(out)
    code, _, err = run(*arguments, "w4a16-g32-sym")
    assert code == 1
    assert "replace it by --force" in err
    assert contents(out) == before
    assert run(*arguments, "w4a16-g32-sym", "--force")[0] == 0
    assert contents(out) != before
    assert "quantization_config" in json.loads((out / "config.json").read_text())
    assert list(tmp_path.iterdir()) == [out]


def test_force_spares_what_is_no_model_or_the_model_itself(run, model_folder, tmp_path):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("one file")
    for out, message in (
        (tmp_path / "papers", "something else than a model"),
        (tmp_path / "file", "is no folder"),
        (model_folder, "holds the model to quantize"),
    ):
        code, _, err = run("quantize", model_folder, "--scheme", "w8a16-sym", "-o", out, "--force")
        assert code == 1
        assert message in err
    assert contents(tmp_path / "papers") == {"thesis.txt": b"years of work"}


def test_an_empty_folder_is_as_good_as_none(run, model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, _ = run("quantize", model_folder, "--scheme", "w8a16-sym", "-o", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, QuantizationError])
def test_a_failure_while_writing_keeps_the_old_folder(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")

    def write() -> None:
        with replaced_folder(out) as folder:
            (folder / "config.json").write_text("half")
            raise error("while writing")

    with pytest.raises(error):
        write()
    assert contents(out) == {"config.json": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_the_new_folder_is_open_to_others_as_any_folder_is(tmp_path):
    (tmp_path / "plain").mkdir()
    with replaced_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
