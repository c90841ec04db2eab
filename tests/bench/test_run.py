"""The command from end to end on a tiny layer, and what it does with faults."""

import math
import time

import pytest
import torch

from bench import cli, driver, plot, results
from bench.accuracy import Reference, error_limit
from bench.driver import Driver, Plan
from bench.roofline import Roofline
from bench.shapes import parse_shape
from bench.subjects import SUBJECTS, Prepared, Problem, Subject
from bench.subjects.dense import ROWS as DENSE
from bench.weights import random_weight
from qkernels.scheme import QuantScheme

TINY = ["--device", "cpu", "--shapes", "64,64", "--rotate-mb", "1", "--cell-seconds", "0.002"]
SCHEMES = ["--schemes", "w4a16-g32,w8a16-sym", "w8a8"]


def run_plan(subjects, m_values=(1, 4), **options):
    plan = Plan(
        device="cpu",
        dtype=torch.bfloat16,
        layers=[parse_shape("64,64")],
        m_values=m_values,
        schemes=[QuantScheme.parse("w4a16-g32")],
        subjects=subjects,
        cell_seconds=0.002,
        rotate_bytes=1 << 16,
        time_limit=options.pop("time_limit", math.inf),
    )
    runner = Driver(plan, Roofline(1e9, {"bf16": 1e9}), **options)
    runner.run()
    return runner


def dense_subject(name, change):
    """A subject whose output is `change` of the right one."""

    def prepare(problem, weight):
        return Prepared(weight.dequantize(), lambda w, x: change(x.float() @ w.T))

    return Subject(name, lambda problem: None, prepare)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    threads = torch.get_num_threads()
    # Without peers that have processes of their own: test_children.py is about these.
    only = ["--subjects", "qkernels *", "torch _*"]
    command = [*TINY, *SCHEMES, *only, "--m", "1", "4", "--output", str(folder), "--threads", "1"]
    code = cli.run(command)
    torch.set_num_threads(threads)
    return code, folder


def test_a_run_leaves_json_and_a_picture(finished):
    code, folder = finished
    assert code == 0
    (path,) = folder.glob("*.json")
    found = results.read(path)
    assert found.stopped is None
    assert found.settings["threads"] == 1
    assert found.roofline["bandwidth_gb_s"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    timed = {(cell.subject, cell.scheme, cell.m) for cell in found.cells if cell.timed}
    for m in (1, 4):
        assert ("torch dense bf16", None, m) in timed
        assert ("torch _weight_int4pack_mm_for_cpu", "w4a16-g32", m) in timed
        assert ("torch _weight_int8pack_mm", "w8a16-sym", m) in timed
        assert ("torch _int_mm + quantize x", "w8a8", m) in timed
        assert ("qkernels reference", "w4a16-g32", m) in timed
        assert ("qkernels WQLinear", "w8a8", m) in timed
    assert not [cell for cell in found.cells if cell.status in ("wrong", "failed", "")]
    assert all(cell.reason for cell in found.cells if cell.status == "declined")
    assert all(cell.copies > 1 for cell in found.cells if cell.timed)


def test_an_earlier_run_is_shown_and_drawn_again(finished, capsys):
    _, folder = finished
    (path,) = folder.glob("*.json")
    path.with_suffix(".png").unlink()
    assert cli.run(["--from", str(path)]) == 0
    assert path.with_suffix(".png").exists()
    assert "torch dense bf16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "tpu"),
        (["--schemes", "w5a16"], "--schemes: scheme 'w5a16' does not parse"),
        (["--models", "gpt9"], "model 'gpt9' is not known"),
        (["--shapes", "64"], "shape '64' is not N,K"),
        (["--m", "0"], "--m 0 must be 1 or more"),
        (["--m", "four"], "--m 'four' is not a whole number"),
        (["--threads", "0"], "--threads 0 must be 1 or more"),
        (["--time-limit", "-1"], "--time-limit -1 must be more than 0"),
        (["--time-limit", "nan"], "--time-limit nan must be more than 0"),
        (["--rotate-mb", "-1"], "--rotate-mb -1 must be 0 or more"),
        (["--subjects", "nobody*"], "--subjects 'nobody*' matches none"),
        (["--dtype", "int3"], "int3"),
        (["--from", "nowhere.json"], "nowhere.json cannot be read"),
        (["--sneed", "1"], "--sneed"),
    ],
)
def test_bad_options_are_one_clear_line(arguments, message, capsys):
    assert cli.run(["--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert cli.run([*TINY, "--output", str(tmp_path / "taken")]) == 2
    assert "--output" in capsys.readouterr().err


def test_cuda_is_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.run(["--device", "cuda"]) == 2
    assert "torch finds no CUDA GPU" in capsys.readouterr().err


def test_list_says_why_a_subject_is_absent(capsys):
    assert cli.run(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "torch dense bf16: runs" in printed
    assert "torch _weight_int4pack_mm: absent: runs on CUDA only" in printed
    assert all(subject.name in printed for subject in SUBJECTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.1,
        lambda y: y.roll(1, dims=1),
        lambda y: y[:, 1:],
        lambda y: y.index_fill(1, torch.tensor([3]), math.nan),
    ],
)
def test_a_wrong_subject_is_told_and_not_timed(change):
    run = run_plan([*DENSE, dense_subject("good", lambda y: y), dense_subject("bad", change)])
    status = {(cell.subject, cell.m): cell for cell in run.cells}
    for m in (1, 4):
        assert status["good", m].timed
        assert status["bad", m].status == "wrong"
        assert not status["bad", m].timed


def test_a_subject_that_raises_does_not_end_the_run():
    def broken(problem, weight):
        raise RuntimeError("no luck\nsecond line")

    def breaks_later(y):
        raise ValueError("late")

    subjects = [
        *DENSE,
        Subject("broken", lambda p: None, broken),
        dense_subject("late", breaks_later),
    ]
    run = run_plan(subjects)
    reasons = {cell.subject: cell.reason for cell in run.cells if cell.status == "failed"}
    assert reasons == {"broken": "RuntimeError: no luck", "late": "ValueError: late"}
    assert any(cell.timed for cell in run.cells)


class InterruptedRunner:
    """A runner of which one sample in some raises what Ctrl-C raises."""

    mode = "call"
    calls = 0

    def enqueue(self):
        type(self).calls += 1
        if self.calls == 8:
            raise KeyboardInterrupt

    def collect(self):
        return 1e-9


def test_an_interrupt_keeps_what_was_measured():
    InterruptedRunner.calls = 0
    run = run_plan(DENSE, make_runner=lambda *_: InterruptedRunner())
    assert run.stopped == "interrupted"
    samples = [cell.samples for cell in run.cells if cell.timed]
    assert sum(samples) == 7
    assert {cell.m for cell in run.cells} == {1}


def test_an_interrupted_command_writes_and_exits_with_130(tmp_path, monkeypatch, capsys):
    InterruptedRunner.calls = 0
    monkeypatch.setattr(driver.Driver, "_default_runner", lambda self, *_: InterruptedRunner())
    assert cli.run([*TINY, *SCHEMES, "--m", "1", "--output", str(tmp_path)]) == 130
    (path,) = tmp_path.glob("*.json")
    assert results.read(path).stopped == "interrupted"
    assert "interrupted" in capsys.readouterr().err


def test_a_time_limit_ends_the_run_and_says_so():
    run = run_plan(DENSE, time_limit=1e-9)
    assert run.stopped == "time limit of 1e-09 s reached"
    assert run.cells == []


def test_what_gets_slow_is_not_run_at_larger_m(monkeypatch):
    monkeypatch.setattr(driver, "SLOW_CALL_SECONDS", 0.0)
    # The limit is 5 budgets then: sleeping for longer is slow on any machine.
    slow = dense_subject("slow", lambda y: (time.sleep(0.05), y)[1])
    run = run_plan([slow], m_values=(1, 2))
    first, second = run.cells
    assert first.timed
    assert (second.status, second.timed) == ("cut", False)
    assert "not run: at M = 1 a call took" in second.reason


def test_without_matplotlib_the_json_still_comes(tmp_path, monkeypatch, capsys):
    def no_matplotlib(*_):
        raise plot.PlotError("matplotlib is not installed (pip install matplotlib)")

    monkeypatch.setattr(plot, "draw", no_matplotlib)
    only = ["--subjects", "qkernels WQLinear"]
    assert cli.run([*TINY, *SCHEMES, *only, "--m", "2", "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out


def able_pairs():
    """Subjects with the schemes that they can run here."""
    pairs = []
    names = ("w4a16-g32", "w4a16-g256", "w4a16-g128-sym", "w8a16-sym", "w8a8", "nf4-g64")
    for name in names:
        problem = Problem(5, 96, 256, torch.float32, "cpu", QuantScheme.parse(name))
        for subject in SUBJECTS:
            if subject.why_not(problem) is None:
                pairs.append(pytest.param(subject, problem, id=f"{subject.name}-{name}"))
    return pairs


@pytest.mark.parametrize(("subject", "problem"), able_pairs())
def test_every_subject_is_right_where_it_can_run(subject, problem):
    weight = random_weight(problem.scheme, problem.n, problem.k, "cpu", 0)
    prepared = subject.prepare(problem, weight)
    x = torch.randn(problem.m, problem.k, generator=torch.Generator().manual_seed(1))
    x_in = prepared.to_input(x)
    for state in (prepared.state, prepared.copy(prepared.state)):
        y = prepared.to_output(prepared.run(state, x_in), x_in)
        error = Reference(weight.dequantize()).expected(x).error(y)
        scheme = None if subject.dense else problem.scheme
        assert error <= error_limit(scheme, quantizes_x=subject.quantizes_x)
    assert prepared.stored_bytes > 0


PEERS = {
    "bitsandbytes": "nf4-g64",
    "onnxruntime MatMulNBits level 0": "w4a16-g128",
    "onnxruntime MatMulNBits level 4": "w4a16-g128-sym",
    "openvino u4": "w4a16-g128",
    "openvino u4, x in int8": "w4a16-g128-sym",
    "openvino u4, in bf16": "w4a16-g128",
    "torch dynamic int8 linear": "w8a8",
}


@pytest.mark.parametrize(("name", "scheme"), PEERS.items())
def test_installed_peers_take_part(name, scheme):
    (subject,) = [subject for subject in SUBJECTS if subject.name == name]
    assert subject.own_process
    problem = Problem(1, 4096, 4096, torch.bfloat16, "cpu", QuantScheme.parse(scheme))
    reason = subject.why_not(problem)
    if reason is not None and ("not installed" in reason or "this torch" in reason):
        pytest.skip(reason)
    assert reason is None


def test_peers_that_are_not_installed_say_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for subject in SUBJECTS:
        problem = Problem(1, 64, 256, torch.bfloat16, "cpu", QuantScheme.parse("w4a16-g128"))
        if subject.name.startswith(("gemlite", "bitsandbytes", "onnxruntime", "openvino")):
            assert "not installed" in subject.why_not(problem)
