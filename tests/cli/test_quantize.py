"""`qkernels quantize`: what it writes, and that nothing half-written or overwritten remains."""

import json
import os
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qkernels as qk
from qkernels.checkpoints.store import ShardWriter
from qkernels.cli import models
from qkernels.cli.quantize import end_of, print_report
from qkernels.errors import QuantizationError
from qkernels.models.loading import load_dense, load_model_and_tokenizer
from qkernels.quantizers.resume import ResumeFolder
from tests.checkpoints.folders import edit_tensors


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


def test_an_observer_is_chosen(run, model_folder, text_file, tmp_path):
    arguments = ("quantize", model_folder, "--scheme", "w8a8-static", "--calibration", text_file)
    scales = {}
    for observer in ("minmax", "percentile(percent=90)"):
        out = tmp_path / observer
        assert run(*arguments, "-o", out, "--observer", observer)[0] == 0
        model = qk.load_model(out)
        scales[observer] = float(model.model.layers[0].self_attn.q_proj.activation_scale)
    assert 0.2 * scales["minmax"] < scales["percentile(percent=90)"] < 0.9 * scales["minmax"]
    code, text, _ = run("list", "observers")
    assert code == 0 and "percent=99.99, a number" in text


@pytest.mark.parametrize(
    ("options", "calibrates"),
    [
        (("--method", "gptq"), True),
        (("--scheme", "w8a8-static"), True),
        (("--override", "*.down_proj=w8a8-static"), True),
        (("--calibration", "shipped"), True),
        ((), False),
    ],
)
def test_what_needs_calibration_gets_the_shipped_text(
    run, model_folder, tmp_path, monkeypatch, options, calibrates
):
    file = tmp_path / "shipped.txt"
    file.write_text("It is a truth universally acknowledged. " * 90)
    monkeypatch.setattr("qkernels.models.evaluation.SHIPPED_CALIBRATION", file)
    seen = []
    real = models.quantize_with_bar

    def watched(*arguments, **more):
        seen.append(more["calibration"])
        return real(*arguments, **more)

    monkeypatch.setattr(models, "quantize_with_bar", watched)
    arguments = ("quantize", model_folder, "--scheme", "w8a16-sym", "--sequences", 20)
    code, text, err = run(*arguments, *options, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert ("relative output error" in text) == calibrates
    if calibrates:
        # The model's context is 128 tokens.
        assert [tuple(batch.shape) for batch in seen[0]] == [(8, 128), (8, 128), (4, 128)]
    else:
        assert seen == [None]


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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_model_is_streamed(run, model_folder, text_file, tmp_path, monkeypatch):
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g32", "--method", "gptq")
    arguments = (*arguments, "--calibration", text_file, "--head", "w8a16-g32", "--format", "gptq")
    expected, out, kept = (tmp_path / name for name in ("expected", "out", "out.unfinished"))
    code, report, _ = run(*arguments, "-o", expected)
    assert code == 0
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", None)
        code, text, err = run(*arguments, "-o", out, "--stream")
        assert (code, " ".join(err.split())) == (
            0,
            f"note: finished blocks are kept in {kept}; the same command goes on from them",
        )
    assert text.replace(str(out), str(expected)).split() == report.split()
    found, wanted = weights(out), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    files, others = contents(out), contents(expected)
    assert {n for n in others if not n.startswith("model")} <= files.keys()
    assert all(files[name] == others[name] for name in files if not name.startswith("model"))
    assert not kept.exists()
    code, _, err = run(*arguments, "-o", out, "--stream")
    assert code == 1 and "is there: choose another output" in err
    assert run(*arguments, "-o", out, "--stream", "--force", "--resume", tmp_path / "run")[0] == 0
    assert contents(out) == files
    assert len(list((tmp_path / "run").glob("block-*"))) == 3


def test_finished_blocks_are_kept_apart_from_the_folders_of_models(run, model_folder, tmp_path):
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g32", "-o", tmp_path / "out")
    for stream in ((), ("--stream",)):
        for folder in (model_folder, tmp_path / "out" / "work"):
            code, _, err = run(*arguments, *stream, "--resume", folder)
            assert code == 1 and "keep finished blocks elsewhere" in err
            assert not (tmp_path / "out").exists()


def test_a_streamed_run_that_was_interrupted_goes_on(run, model_folder, tmp_path, monkeypatch):
    arguments = ("quantize", model_folder, "--scheme", "w4a16-g32", "--stream")
    assert run(*arguments, "-o", tmp_path / "expected")[0] == 0
    again = (*arguments, "-o", tmp_path / "out")
    real = ShardWriter.finish

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", interrupted)
    code, _, err = run(*again)
    assert code == 130 and "interrupted" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out.unfinished"]
    monkeypatch.setattr(ShardWriter, "finish", real)
    code, _, err = run(*again, "--exclude", "*.down_proj")
    assert code == 1 and "differs in the schemes of layers" in err
    assert run(*again)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    code, _, err = run("quantize", gguf, "--scheme", "w8a16", "--stream", "-o", tmp_path / "new")
    assert code == 1 and "GGUF file, which is read as a whole" in err


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
        (("--head", "w5"), "scheme 'w5' does not parse"),
        (("--embedding", "w8a16"), "takes the place of an embedding; formats that hold it: qk"),
        (("--embedding", "w8a8", "--format", "qkernels"), "has no activations to quantize"),
        (("--format", "exl2"), "format 'exl2' is not one of compressed-tensors, qkernels"),
        (("--method", "magic"), "method 'magic' is not one of"),
        (("--observer", "median"), "observer 'median' is not one of minmax, moving_average"),
        (("--calibration", "missing.txt"), "cannot read the text missing.txt"),
        (("--sequences", "2", "--calibration", "."), "cannot read the text ."),
    ],
)
def test_wrong_options_write_nothing(run, model_folder, tmp_path, options, message: str):
    arguments = ("quantize", model_folder, "--scheme", "w8a16-sym", "-o", tmp_path / "out")
    code, out, err = run(*arguments, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_head_and_embedding(run, model_folder, tmp_path):
    out, scheme = tmp_path / "out", "w8a16-g32"
    ends = ("--head", scheme, "--embedding", scheme, "--format", "qkernels")
    code, text, _ = run("quantize", model_folder, "--scheme", "w4a16-g32", *ends, "-o", out)
    assert code == 0 and re.search(r"quantized layers +│ 16 \(w4a16-g32, w8a16-g32\)", text)
    model = qk.load_model(out)
    assert str(model.lm_head.scheme) == str(model.model.embed_tokens.scheme) == scheme
    code, text, _ = run("inspect", out)
    assert code == 0 and re.search(rf"model.embed_tokens +│ +1 │ {scheme} ", text)


def test_what_has_no_ends():
    for part in ("head", "embedding"):
        with pytest.raises(QuantizationError, match=f"does not say which layer is its {part}"):
            end_of(torch.nn.Linear(2, 2), part)


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_while_writing_keeps_the_old_folder(
    run, model_folder, tmp_path, error, monkeypatch
):
    out = tmp_path / "out"
    arguments = ("quantize", model_folder, "-o", out, "--scheme")
    assert run(*arguments, "w8a16-sym")[0] == 0
    before = contents(out)

    def fail(writer):
        raise error

    monkeypatch.setattr(ShardWriter, "finish", fail)
    code, _, err = run(*arguments, "w4a16-g32-sym", "--force")
    if error is KeyboardInterrupt:
        assert (code, err) == (130, "qkernels: interrupted\n")
    else:
        assert (code, err) == (1, f"qkernels: {out} cannot be written: No space left on device\n")
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_everything_is_open_to_others_as_any_file_is(run, model_folder, tmp_path):
    before = os.umask(0o027)
    try:
        code, _, _ = run("quantize", model_folder, "--scheme", "w8a16", "-o", tmp_path / "out")
    finally:
        os.umask(before)
    assert code == 0
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in modes} > {"tokenizer.json", "config.json", "model.safetensors"}
    assert set(modes.values()) == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_a_tokenizer_that_cannot_be_saved_stops_it_before_the_work(
    run, model_folder, tmp_path, monkeypatch
):
    def fail(*arguments):
        raise TypeError("not serializable")

    monkeypatch.setattr("qkernels.quantizers.model.drive", lambda *a: pytest.fail("quantizes"))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    code, _, err = run("quantize", model_folder, "--scheme", "w8a16", "-o", tmp_path / "out")
    assert code == 1
    assert "has a tokenizer that cannot be saved (TypeError: not serializable)" in err
    assert list(tmp_path.iterdir()) == []


def test_what_prepares_a_models_inputs_comes_along(run, model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    (source / "preprocessor_config.json").write_text('{"size": 224}')
    assert run("quantize", source, "--scheme", "w8a16", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 224}'
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    code, _, err = run("quantize", source, "--scheme", "w8a16", "-o", tmp_path / "without")
    assert (code, err) == (
        0,
        f"note: {source} holds no tokenizer, so {tmp_path / 'without'} will hold none\n",
    )
    code, _, err = run("eval", tmp_path / "without")
    assert code == 1 and "without holds no tokenizer: write it there by tokenizer.save_pre" in err


def test_a_generation_config_that_transformers_finds_wrong_is_carried_along(
    run, model_folder, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    settings = {"do_sample": False, "temperature": 0.5, "top_p": 0.25}
    (source / "generation_config.json").write_text(json.dumps(settings))
    code, _, err = run("quantize", source, "--scheme", "w8a16", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.items() <= written.items()
    assert run("generate", tmp_path / "out", "-p", "a", "--max-new-tokens", 1)[0] == 0


def test_random_weights_are_never_quantized(run, model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    edit_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    for command in (
        ("quantize", source, "--scheme", "w8a16", "-o", tmp_path / "out"),
        ("eval", source, "--scheme", "w8a16"),
        ("inspect", source),
    ):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert "source lacks model.layers.1.mlp.up_proj.weight of a LlamaForCausalLM" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_that_are_not_used_are_named(run, model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    more = {f"model.layers.1.mlp.extra{i}": torch.ones(2) for i in range(5)}
    edit_tensors(source, lambda tensors: tensors.update(more))
    code, _, err = run("quantize", source, "--scheme", "w8a16", "-o", tmp_path / "out")
    assert code == 0
    assert err == (
        f"note: {source} holds model.layers.1.mlp.extra0, model.layers.1.mlp.extra1, "
        "model.layers.1.mlp.extra2 and 2 more, which a LlamaForCausalLM does not use\n"
    )


def test_no_memory_is_said_in_a_line(run, model_folder, tmp_path, monkeypatch):
    text = "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried 12 bytes"
    for error, said in ((RuntimeError(text), text), (MemoryError(), "no more can be had")):
        monkeypatch.setattr("qkernels.quantizers.model.drive", raiser(error))
        code, _, err = run("quantize", model_folder, "--scheme", "w8a16", "-o", tmp_path / "out")
        assert code == 1
        assert err == f"qkernels: out of memory: {said}\n"
    assert list(tmp_path.iterdir()) == []


def raiser(error):
    def fail(*arguments):
        raise error

    return fail
