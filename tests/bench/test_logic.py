"""The benchmark's arithmetic, order of calls and files. Nothing here asserts a time."""

import json
import math
import types

import pytest
import torch

from bench import load, plot, report, roofline
from bench.accuracy import Reference, error_limit
from bench.driver import fill
from bench.results import Cell, Results, ResultsError, field_names, new_path
from bench.roofline import Roofline
from bench.shapes import MODELS, model_layers, parse_shape, without_repeats
from bench.subjects import SUBJECTS, Problem
from bench.timing import (
    MIN_SAMPLES,
    Contestant,
    CpuRunner,
    Samples,
    Turns,
    copies_for,
    race,
    rounds,
)
from bench.weights import random_weight, scheme_bytes
from qkernels.scheme import QuantScheme

SCHEMES = (
    *("w4a16-g128", "w4a16-g128-sym", "w4a16", "w3a16-g64", "w2a16-g32", "w8a16-sym", "nf4-g64"),
    *("nf4-g64-dq", "fp4-g32", "fp8e4m3-a16", "fp8e5m2-a16", "w8a8", "w8a8-static"),
    *("w8a8-tensor", "w4a8-g128", "w4a8", "w8a8-g128", "fp8-a8", "w4a16-gtensor"),
)


def make_cell(**changes) -> Cell:
    values = {
        "subject": "a",
        "scheme": "w8a8",
        "model": "x",
        "layer": "o",
        "n": 64,
        "k": 32,
        "m": 4,
        "dtype": "bf16",
        "status": "",
        "bytes": 4000,
        "operations": 1_000_000,
    }
    return Cell(**{**values, **changes})


def make_results(cells: list[Cell], **changes) -> Results:
    values = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["bench"],
        "machine": {"cpu": "C"},
        "versions": {"torch": "2"},
        "commit": "a" * 40,
        "dirty": True,
        "settings": {},
    }
    return Results(**{**values, **changes}, cells=cells)


def timed_cell(**changes) -> Cell:
    cell = make_cell(**changes)
    fill(cell, Samples([1e-6] * MIN_SAMPLES), Roofline(1e9, {"bf16": 1e12}), "half", 2e-6)
    return cell


@pytest.mark.parametrize(
    ("model", "layer", "shape"),
    [
        ("llama3-8b", "qkv", (6144, 4096)),
        ("llama3-8b", "gate_up", (28672, 4096)),
        ("llama3-70b", "qkv", (10240, 8192)),
        ("llama3-70b", "down", (8192, 28672)),
        ("qwen2.5-7b", "qkv", (4608, 3584)),
        ("qwen3-8b", "gate_up", (24576, 4096)),
        ("smollm2-135m", "qkv", (960, 576)),
    ],
)
def test_shapes_of_models(model, layer, shape):
    assert [(x.n, x.k) for x in MODELS[model] if x.name == layer] == [shape]


def test_shapes_are_parsed_and_refused():
    assert (parse_shape("64,32").n, parse_shape("64x32").k) == (64, 32)
    for text in ("64", "64,x", "0,4", "1,2,3", ""):
        with pytest.raises(ValueError, match="shape"):
            parse_shape(text)
    with pytest.raises(ValueError, match="'gpt9' is not known: use one of llama3-8b"):
        model_layers("gpt9")
    both = [*model_layers("targets"), *model_layers("targets-cpu")]
    assert without_repeats(both) == list(model_layers("targets"))


def test_roofline_takes_the_larger_of_two_times():
    roofline = Roofline(100.0, {"fp32": 10.0, "bf16": 50.0, "int8": 200.0})
    assert roofline.floor(1000, 100, "half") == 10.0
    assert roofline.floor(100, 1000, "half") == 20.0
    assert roofline.floor(100, 1000, "int8") == 5.0
    assert roofline.floor(100, 1000, "fp32") == 100.0
    assert roofline.percent(1000, 100, "half", 40.0) == 25.0
    assert Roofline(0.0).percent(1000, 100, "half", 40.0) is None


def test_slow_int8_product_does_not_lower_the_ceiling():
    assert Roofline(1.0, {"bf16": 50.0, "int8": 2.0}).peak("int8") == 50.0


def test_cell_arithmetic():
    cell = make_cell()
    samples = Samples([4e-6, 2e-6, 1e-6, 3e-6, 100e-6])
    fill(cell, samples, Roofline(4e9, {"bf16": 1e12}), "half", dense=6e-6)
    assert (cell.median_us, cell.min_us, cell.p90_us) == pytest.approx((3.0, 1.0, 100.0))
    assert cell.gb_s == pytest.approx(4000 / 3e-6 / 1e9)
    assert cell.tflop_s == pytest.approx(1e6 / 3e-6 / 1e12)
    assert cell.roofline_percent == pytest.approx(100 / 3)
    assert (cell.vs_dense, cell.dense_us) == pytest.approx((2.0, 6.0))
    assert (cell.samples, cell.status) == (5, "measured")
    fill(cell, Samples([1.0]), Roofline(1.0), "half", None)
    assert (cell.status, cell.vs_dense, cell.dense_us) == ("cut", None, None)


def test_rotation_covers_the_caches_within_the_memory():
    assert copies_for(10, rotate_bytes=95, memory_bytes=10_000, subjects=2) == 10
    assert copies_for(10, rotate_bytes=95, memory_bytes=120, subjects=2) == 6
    assert copies_for(1000, rotate_bytes=95, memory_bytes=10, subjects=2) == 1
    assert copies_for(1, rotate_bytes=10**9, memory_bytes=10**12, subjects=1) == 256
    for size in (1, 7, 100):
        copies = copies_for(size, 10_000, memory_bytes=3000, subjects=3)
        assert copies * size * 3 <= 3000


class FakeRunner:
    """Lets a fake clock pass and notes the order of the calls."""

    mode = "fake"

    def __init__(self, name, seconds, clock, calls):
        self.name, self.seconds, self.clock, self.calls = name, seconds, clock, calls

    def enqueue(self):
        self.calls.append(self.name)
        self.clock[0] += self.seconds

    def collect(self):
        return self.seconds


def fake_race(seconds, budget, **options):
    clock, calls = [0.0], []
    racers = [Contestant(n, FakeRunner(n, s, clock, calls)) for n, s in seconds.items()]
    race(racers, budget, clock=lambda: clock[0], **options)
    return calls, {racer.name: racer.seconds for racer in racers}


def test_contestants_take_turns():
    calls, _ = fake_race({"a": 1.0, "b": 2.0}, budget=8.0)
    assert calls[:10] == ["a", "b"] * 5
    assert calls[10:] == ["a"] * 3


def test_a_slow_contestant_is_cut_and_a_deadline_kept():
    _, seconds = fake_race({"fast": 0.125, "slow": 10.0}, budget=1.0)
    assert (len(seconds["slow"]), len(seconds["fast"])) == (1, 8)
    calls, _ = fake_race({"a": 1.0}, budget=100.0, deadline=3.5)
    assert len(calls) == 4
    assert fake_race({"a": 1.0}, budget=100.0, deadline=-1.0)[0] == []


def test_long_turns_begin_with_calls_that_are_no_samples():
    turns = Turns(settle=1.5, length=3.0)
    calls, seconds = fake_race({"a": 1.0, "b": 2.0}, budget=6.0, turns=turns)
    assert calls[:8] == ["a"] * 5 + ["b"] * 3
    assert len(seconds["a"]) == 6
    assert len(seconds["b"]) == 5
    # A turn of "a" has two such calls, one of "b" has one.
    assert (calls.count("a"), calls.count("b")) == (6 + 2 * 2, 5 + 3)


def test_what_rounds_x_may_err_more():
    weight_only, both = QuantScheme.parse("w4a16-g128"), QuantScheme.parse("w8a8")
    assert error_limit(weight_only) == error_limit(None)
    assert error_limit(weight_only, quantizes_x=True) == error_limit(both) > error_limit(None)


def test_peaks_of_the_extension_count_where_they_are_higher(monkeypatch):
    compiled = types.SimpleNamespace(
        cpu_peaks=lambda threads, seconds: {"read": 1e30, "bf16": 1e30, "fp32": 1.0, "int8": 1e30}
    )
    monkeypatch.setattr(roofline.importlib, "import_module", lambda name: compiled)
    found = roofline.measure("cpu", torch.bfloat16, with_int8=False, small=True)
    assert (found.bandwidth, found.peaks["bf16"]) == (1e30, 1e30)
    assert found.peaks["fp32"] > 1e3
    assert "int8" not in found.peaks
    del compiled.cpu_peaks
    assert roofline.measure("cpu", torch.bfloat16, with_int8=True, small=True).bandwidth < 1e15


def test_rounds_end_at_the_largest_number_of_samples():
    racer = Contestant("a", None, seconds=[0.0] * 10_000)
    assert list(rounds([racer], budget=1e9)) == []


def test_copies_of_a_weight_take_turns():
    seen = []
    runner = CpuRunner(lambda state, x: seen.append((state, x)), ["w0", "w1", "w2"], "x")
    for _ in range(4):
        runner.enqueue()
        assert runner.collect() >= 0
    assert seen == [("w0", "x"), ("w1", "x"), ("w2", "x"), ("w0", "x")]


@pytest.mark.parametrize("name", SCHEMES)
def test_random_weights_of_every_scheme(name):
    scheme = QuantScheme.parse(name)
    weight = random_weight(scheme, 40, 256, "cpu", seed=3)
    dense = weight.dequantize()
    assert dense.isfinite().all()
    assert 1e-3 < float(dense.std()) < 0.5
    assert torch.equal(weight.codes, random_weight(scheme, 40, 256, "cpu", seed=3).codes)
    assert not torch.equal(weight.codes, random_weight(scheme, 40, 256, "cpu", seed=4).codes)


def test_bytes_that_a_scheme_needs():
    def count(name):
        return scheme_bytes(random_weight(QuantScheme.parse(name), 64, 256, "cpu", 0))

    groups = 64 * 256 // 128
    assert count("w4a16-g128-sym") == 64 * 256 // 2 + 2 * groups
    assert count("w4a16-g128") == 64 * 256 // 2 + 2 * groups + groups // 2
    assert count("w8a8") == 64 * 256 + 4 * 64


def test_accuracy_tells_right_from_wrong():
    source = torch.Generator().manual_seed(0)
    w, x = (torch.randn(s, generator=source) for s in ((48, 64), (40, 64)))
    expected, y = Reference(w).expected(x), x @ w.T
    limit = error_limit(None)
    assert expected.error(y) < 1e-5
    assert expected.error(y.bfloat16()) < limit
    shifted = y.clone()
    shifted[17] = shifted[18]  # a row that is not compared directly
    scaled, unwritten = y * 1.05, y.clone()
    unwritten[20, 5] = math.nan
    for wrong in (shifted, scaled, unwritten, y[:, :-1], torch.zeros_like(y)):
        assert not expected.error(wrong) <= limit


@pytest.mark.parametrize("m", [1, 4])
def test_chance_never_makes_a_right_output_wrong(m):
    for seed in range(200):
        source = torch.Generator().manual_seed(seed)
        w, x = (torch.randn(s, generator=source) for s in ((64, 64), (m, 64)))
        expected = Reference(w, seed).expected(x)
        assert expected.error((x @ w.T).bfloat16()) < error_limit(None)
        scale = x.abs().amax(dim=1, keepdim=True) / 448
        fp8 = ((x / scale).to(torch.float8_e4m3fn).float() * scale) @ w.T
        assert expected.error(fp8) < error_limit(QuantScheme.parse("fp8-a8"))


def test_load_counts_what_others_used():
    text = "cpu  100 0 50 800 50 0 0 0 100 0\ncpu0 1 2 3\n"
    assert load.parse_stat(text, 100) == (1.5, 10.0)
    before, after = load.Snapshot(0, 0, 0), load.Snapshot(6.0, 1.0, 10.0)
    assert load.others_percent(before, after) == 50.0
    assert load.others_percent(before, before) is None
    assert load.others_percent(None, after) is None
    assert load.warning([None, 1.0, 9.9]) is None
    assert "up to 75%" in load.warning([75.0, 2.0])
    assert "1 of 2" in load.warning([75.0, 2.0])


def test_a_busy_machine_is_told_beside_cpu_figures_alone():
    cells = [timed_cell(others_percent=75.0)]
    assert any("UNRELIABLE" in line for line in report.heading(make_results(cells)))
    on_gpu = make_results(cells, machine={"gpu": {"name": "G"}})
    assert not any("UNRELIABLE" in line for line in report.heading(on_gpu))
    # A race of a child is one of its own.
    apart = [timed_cell(others_percent=1.0), timed_cell(others_percent=75.0, own_process=True)]
    assert "1 of 2" in load.of_run(make_results(apart))
    busy_ceilings = make_results([timed_cell()], roofline={"others_percent": 40.0})
    assert any("UNRELIABLE" in line for line in report.heading(busy_ceilings))


def test_json_round_trip_and_refusals():
    wrong = make_cell(status="wrong", reason="r")
    results = make_results([timed_cell(), wrong], stopped="interrupted")
    assert Results.from_json(results.to_json()) == results
    data = json.loads(results.to_json())
    for change in ({"schema": "other/1"}, {"cells": [{"m": 1}]}, {"extra": 1}):
        with pytest.raises(ResultsError):
            Results.from_json(json.dumps({**data, **change}))
    data["cells"][0]["status"] = "guessed"
    with pytest.raises(ResultsError, match="guessed"):
        Results.from_json(json.dumps(data))
    for text in ("{", "[]"):
        with pytest.raises(ResultsError):
            Results.from_json(text)


def test_infinity_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        make_results([make_cell(error=math.inf)]).to_json()


def test_a_run_never_overwrites_another(tmp_path):
    assert new_path(tmp_path, "a").name == "a.json"
    (tmp_path / "a.json").touch()
    assert new_path(tmp_path, "a").name == "a-2.json"


def test_documentation_names_every_field(request):
    text = (request.config.rootpath / "docs" / "benchmarks.md").read_text()
    missing = {f for names in field_names().values() for f in names if f"`{f}`" not in text}
    assert not missing


def test_numbers_have_three_digits():
    shown = [report.number(v) for v in (None, 0, 0.00123, 0.1, 1.234, 12.34, 123.4, 12345.6)]
    assert shown == ["-", "0", "0.00123", "0.1", "1.23", "12.3", "123", "12346"]


def test_reasons_leave_out_schemes_a_subject_is_not_made_for():
    cells = [
        timed_cell(subject="ran"),
        make_cell(subject="ran", scheme="nf4", status="declined", reason="runs w8a8, not nf4"),
        make_cell(subject="gone", status="declined", reason="not installed"),
        make_cell(subject="gone", scheme="nf4", status="declined", reason="not installed", m=8),
    ]
    lines = report.reasons(make_results(cells))
    assert lines == ["gone (nf4, w8a8; M = 4, 8) declined: not installed"]


def test_a_chosen_kernel_that_is_not_the_fastest_is_told():
    def kernel(name, us, **changes):
        cell = timed_cell(subject=f"qkernels {name}", **{"kernel": name, **changes})
        cell.median_us = us
        return cell

    def cells(m, chosen_us):
        return [
            kernel("WQLinear", 9.0, kernel="cpu_a", m=m),
            kernel("cpu_a", chosen_us, m=m),
            kernel("cpu_b", 2.0, m=m),
            timed_cell(subject="peer", m=m),
        ]

    assert report.slower_choices(make_results([*cells(1, 2.1), *cells(4, 1.0)])) == []
    (line,) = report.slower_choices(make_results([*cells(1, 2.5), *cells(4, 3.0)]))
    assert line == (
        "cpu_a is chosen and takes longer than cpu_b, times: w8a8 64x32 M = 1: 1.25, "
        "w8a8 64x32 M = 4: 1.50"
    )
    without_the_layer = cells(1, 3.0)[1:]
    assert report.slower_choices(make_results(without_the_layer)) == []


def test_plain_tables_without_rich(monkeypatch, capsys):
    def without_rich(results, stream):
        raise ImportError("rich")

    monkeypatch.setattr(report, "_print_rich", without_rich)
    report.print_results(make_results([timed_cell(subject="some kernel")]))
    printed = capsys.readouterr().out
    assert "rich is not installed" in printed
    assert "some kernel" in printed


def compared_cell(ratio, **changes) -> Cell:
    """A cell beside a dense product: `ratio` times as fast, where the roofline is 10 times."""
    cell = timed_cell(**changes)
    cell.vs_dense, cell.dense_us, cell.floor_us = ratio, 20.0, 2.0
    return cell


def test_a_picture_needs_something_timed(tmp_path):
    with pytest.raises(plot.PlotError, match="nothing was timed"):
        plot.draw(make_results([make_cell()]), tmp_path / "a.png")
    alone = timed_cell()
    alone.vs_dense = None
    with pytest.raises(plot.PlotError, match="nothing was timed beside a dense product"):
        plot.draw(make_results([alone]), tmp_path / "a.png")
    with pytest.raises(plot.PlotError, match="9x9 was not measured; there are 64x32"):
        plot.draw(make_results([compared_cell(2.0)]), tmp_path / "a.png", ["9x9"])


def test_a_curve_of_ours_is_the_layer_and_else_the_fastest_kernel():
    kernels = [
        compared_cell(3.0, subject="qkernels cpu_a", m=16),
        compared_cell(2.0, subject="qkernels cpu_a", m=1),
        compared_cell(5.0, subject="qkernels cpu_b", m=1),
    ]
    peer = compared_cell(4.0, subject="peer", m=1)
    roofline = {1: 10.0, 16: 10.0}
    ours = {1: 5.0, 16: 3.0}
    found = plot.curves([*kernels, peer])
    assert found == {"qkernels": ours, "roofline": roofline, "peer": {1: 4.0}}
    layer = compared_cell(2.5, subject="qkernels WQLinear", m=16)
    assert plot.curves([*kernels, layer]) == {"qkernels": {16: 2.5}, "roofline": {16: 10.0}}
    assert plot.curves([peer]) == {"peer": {1: 4.0}}


def test_labels_are_moved_apart_and_no_farther():
    placed = plot.apart({"a": 0.5, "b": 0.52, "c": 0.9, "d": 0.51}, 0.1)
    assert placed == pytest.approx({"a": 0.41, "d": 0.51, "b": 0.61, "c": 0.9})
    # A pair that makes room for itself meets the next.
    placed = plot.apart({"a": 0.0, "b": 0.0, "c": 0.08}, 0.1)
    assert placed == pytest.approx({"a": 0.08 / 3 - 0.1, "b": 0.08 / 3, "c": 0.08 / 3 + 0.1})
    assert plot.apart({}, 0.1) == {}


def test_a_picture_has_a_panel_for_each_layer_and_scheme(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    figures = []
    save = figure_module.Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    cells = [
        compared_cell(ratio, subject=subject, m=m, n=n, scheme=scheme)
        for n in (64, 128)
        for scheme in ("w8a8", "nf4-g64")
        for m in (1, 16)
        for subject, ratio in (("qkernels WQLinear", 0.02 * n * m), ("torch peer", 0.3))
    ]
    assert plot.draw(make_results(cells), tmp_path / "a.png") == []
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["w8a8, 64x32", "nf4-g64, 64x32", "w8a8, 128x32", "nf4-g64, 128x32"]
    for axis in figure.axes:
        low, high = axis.get_ylim()
        for line in axis.get_lines():
            assert all(low <= y <= high for y in line.get_ydata())
        assert {text.get_text() for text in axis.texts} == {"qkernels", "roofline", "peer"}


def test_subjects_have_names_of_their_own_and_always_a_baseline():
    names = [subject.name for subject in SUBJECTS]
    assert len(set(names)) == len(names)
    problem = Problem(1, 63, 65, torch.bfloat16, "cpu", QuantScheme.parse("w3a16-g64"))
    able = [subject.name for subject in SUBJECTS if subject.why_not(problem) is None]
    assert "torch dense bf16" in able
    assert all(subject.why_not(problem) != "" for subject in SUBJECTS)
