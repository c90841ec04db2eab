"""Peers in processes of their own: what starts, what is kept of it, and what faults leave."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch

from bench import children, cli, report, results
from bench.children import Children, apart, failed_cells, run_child
from bench.driver import Driver, Plan
from bench.results import Results
from bench.roofline import Roofline
from bench.shapes import parse_shape
from bench.subjects import Prepared, Subject
from bench.subjects.dense import ROWS as DENSE
from qkernels.scheme import QuantScheme

CEILINGS = Roofline(1e9, {"bf16": 1e12})


def peer(name="peer", reason=None, **options):
    """A subject with a process of its own; `reason` is why it runs no 4-bit weight."""

    def why_not(problem):
        return None if problem.scheme.bits == 8 else reason

    def prepare(problem, weight):
        return Prepared(weight.dequantize(), lambda w, x: x.float() @ w.T)

    return Subject(name, why_not, prepare, own_process=True, **options)


def make_plan(subjects, **changes):
    plan = Plan(
        device="cpu",
        dtype=torch.bfloat16,
        layers=[parse_shape("64,64")],
        m_values=(1, 4),
        schemes=[QuantScheme.parse("w4a16-g32"), QuantScheme.parse("w8a16-sym")],
        subjects=subjects,
        cell_seconds=0.002,
        rotate_bytes=1 << 16,
    )
    return replace(plan, **changes)


def program(tmp_path, body):
    """A command that runs `body` in place of the benchmark, with its options in `options`."""
    text = """
        import json, os, pathlib, signal, sys, time
        names, values = sys.argv[1::2], sys.argv[2::2]
        options = dict(zip(names, values))

        def write(cells, stopped=None):
            folder = pathlib.Path(options["--output"])
            folder.mkdir()
            head = json.loads(pathlib.Path(__file__).with_name("head.json").read_text())
            text = json.dumps({**head, "cells": cells, "stopped": stopped})
            (folder / "a.json").write_text(text)

        def cell(subject, **values):
            return dict(subject=subject, scheme="w8a16-sym", model="custom", layer="linear", n=64,
                        k=64, m=1, dtype="bf16", status="measured", **values)
    """
    head = Results("2026-01-02T03:04:05+00:00", [], {}, {}, None, None, {})
    (tmp_path / "head.json").write_text(head.to_json())
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(text) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def run_children(tmp_path, body, subjects, arguments=(), **changes):
    run = Children(
        make_plan([*DENSE, *subjects], **changes),
        subjects,
        CEILINGS,
        arguments,
        started=time.perf_counter(),
        program=program(tmp_path, body),
    )
    run.run()
    return run


def test_only_peers_that_run_something_on_the_cpu_get_a_process():
    runs, absent = peer("runs", reason="no 4 bits"), Subject("absent", lambda p: "no", None)
    plan = make_plan([*DENSE, runs, replace(absent, own_process=True)])
    assert apart(plan) == [runs]
    assert apart(replace(plan, device="cuda")) == []
    assert children.parents_share(plan, []) == 1
    # Two dense rows against one scheme and its dense row, twice.
    assert children.parents_share(plan, [runs]) == pytest.approx(2 / (2 + 4))


def test_cells_of_a_child_are_kept_without_its_dense_ones(tmp_path):
    body = """
        assert options["--m"] == "1"
        assert options["--subjects"] == "peer [[]x]"
        ceilings = json.loads(options["--child"])
        write([cell("torch dense bf16"), cell("peer [x]", gb_s=ceilings["bandwidth"])])
    """
    run = run_children(tmp_path, body, [peer("peer [x]")], arguments=["--m", "1"])
    assert [(cell.subject, cell.gb_s) for cell in run.cells] == [("peer [x]", 1e9)]
    assert run.stopped is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its process was ended by SIGSEGV"),
        ("sys.exit('no luck')", "its process ended with status 1 and no results: no luck"),
        ("pass", "its process ended with status 0 and no results"),
        (
            "os.mkdir(options['--output']); open(options['--output'] + '/a.json', 'w').write('{')",
            "not a JSON file",
        ),
    ],
)
def test_a_child_that_crashes_is_a_failed_row_and_the_next_one_runs(tmp_path, body, reason):
    body = f"if options['--subjects'] == 'bad':\n    {body}\nelse:\n    write([cell('good')])"
    bad, good = peer("bad", reason="no 4 bits"), peer("good")
    run = run_children(tmp_path, body, [bad, good])
    failed = [cell for cell in run.cells if cell.subject == "bad"]
    assert {(cell.scheme, cell.m, cell.status) for cell in failed} == {
        (scheme, m, status)
        for m in (1, 4)
        for scheme, status in (("w4a16-g32", "declined"), ("w8a16-sym", "failed"))
    }
    assert all(reason in cell.reason for cell in failed if cell.status == "failed")
    assert all(cell.reason == "no 4 bits" for cell in failed if cell.status == "declined")
    assert [cell.status for cell in run.cells if cell.subject == "good"] == ["measured"]
    assert run.stopped is None


def test_cells_of_a_child_that_crashes_after_it_wrote_count(tmp_path):
    run = run_children(tmp_path, "write([cell('peer')]); os.abort()", [peer()])
    assert [cell.status for cell in run.cells] == ["measured"]


def test_a_child_gets_its_part_of_the_time_limit(tmp_path):
    body = "write([cell(options['--subjects'], median_us=float(options['--time-limit']))])"
    run = run_children(tmp_path, body, [peer("a"), peer("b")], time_limit=1000.0)
    first, second = (cell.median_us + children.START_SECONDS for cell in run.cells)
    assert 490 < first <= 500
    # What the first one left over is the second one's.
    assert 990 < second <= 1000
    late = run_children(tmp_path, body, [peer()], time_limit=1e-9)
    assert (late.cells, late.stopped) == ([], "time limit of 1e-09 s reached")


def test_a_child_that_is_cut_by_its_time_limit_says_so(tmp_path):
    body = "write([cell('peer')], stopped='time limit of 3 s reached')"
    run = run_children(tmp_path, body, [peer()], time_limit=60.0)
    assert len(run.cells) == 1
    assert run.stopped == "time limit of 60 s reached"


def test_a_child_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "GRACE_SECONDS", 0.2)
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    run = run_children(tmp_path, body, [peer()], time_limit=0.3)
    assert {cell.status for cell in run.cells} == {"failed"}
    assert "past its time limit" in run.cells[0].reason
    assert run.stopped == "time limit of 0.3 s reached"


def interrupt_when(path):
    """Sends this process what Ctrl-C sends, as soon as the file is there."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("obeys", [True, False])
def test_an_interrupt_is_passed_on_and_leaves_no_process(tmp_path, monkeypatch, obeys):
    monkeypatch.setattr(children, "INTERRUPT_SECONDS", 10.0 if obeys else 0.2)
    body = f"""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ready = pathlib.Path({str(tmp_path)!r}, "ready")
        try:
            (tmp := ready.with_name("tmp")).write_text(str(os.getpid()))
            tmp.rename(ready)
            time.sleep(60)
        except KeyboardInterrupt:
            if {obeys}:
                write([cell(options["--subjects"])], stopped="interrupted")
                sys.exit(130)
            time.sleep(60)
    """
    thread = interrupt_when(tmp_path / "ready")
    run = run_children(tmp_path, body, [peer("a"), peer("b")])
    thread.join()
    assert run.stopped == "interrupted"
    assert [cell.subject for cell in run.cells] == (["a"] if obeys else [])
    assert not alive(int((tmp_path / "ready").read_text()))


def test_a_child_ends_with_its_parent(tmp_path):
    code = (
        "import time; from bench.children import end_with_parent as e; e(); print(); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=children.REPOSITORY,
    ) as child:
        assert child.stdout.readline() == b"\n"
        child.stdin.close()
        assert child.wait(10) == 1


def test_a_child_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(children.tempfile, "tempdir", str(tmp_path))
    assert run_child([sys.executable, "-c", ""]).failure is not None
    assert list(tmp_path.iterdir()) == []


def test_failed_cells_fill_every_problem():
    plan = make_plan([peer()])
    cells = failed_cells(plan, plan.subjects[0], "why")
    assert len(cells) == 4
    assert all(
        (cell.status, cell.reason, cell.own_process) == ("failed", "why", True) for cell in cells
    )


def test_subjects_with_pools_take_long_turns_and_only_warm_copies():
    states = []

    def run(state, x):
        states.append(id(state))
        return x.float() @ state.T

    def prepare(problem, weight):
        return Prepared(weight.dequantize(), run)

    pooled = Subject("pooled", lambda problem: None, prepare, own_process=True)
    schemes = [QuantScheme.parse("w8a16-sym")]
    runner = Driver(make_plan([*DENSE, pooled], schemes=schemes, m_values=(1,)), CEILINGS)
    runner.run()
    (cell,) = [cell for cell in runner.cells if cell.subject == "pooled"]
    assert cell.own_process
    assert cell.vs_dense == pytest.approx(cell.dense_us / cell.median_us)
    # Before anything is timed: the check, three calls for their time, and one of every other copy.
    warm = 1 + 3 + (cell.copies - 1)
    assert len(set(states)) == len(set(states[:warm])) == cell.copies
    assert len(states) > warm + cell.samples


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the whole command on a tiny layer with the real child of torch's dynamic int8 layer."""
    monkeypatch.setattr(
        cli, "SUBJECTS", [s for s in cli.SUBJECTS if s.dense or "dynamic" in s.name]
    )

    def run(*arguments):
        options = ["--device", "cpu", "--shapes", "64,64", "--m", "2", "--rotate-mb", "1"]
        options += ["--schemes", "w8a8,w8a16-sym", "--cell-seconds", "0.01", *arguments]
        code = cli.run([*options, "--output", str(tmp_path / "out")])
        (path,) = (tmp_path / "out").glob("*.json")
        return code, results.read(path)

    return run


def test_a_real_child_from_end_to_end(command, capsys):
    code, found = command()
    assert code == 0
    cells = {(cell.subject, cell.scheme): cell for cell in found.cells}
    timed = cells["torch dynamic int8 linear", "w8a8"]
    assert timed.timed, timed.reason
    assert timed.own_process
    assert timed.vs_dense == pytest.approx(timed.dense_us / timed.median_us)
    assert cells["torch dynamic int8 linear", "w8a16-sym"].status == "declined"
    # Once each, from this process.
    dense = [cell for cell in found.cells if cell.scheme is None and cell.timed]
    assert sorted(cell.subject for cell in dense) == ["torch dense bf16", "torch dense fp32"]
    assert not any(cell.own_process for cell in dense)
    assert "torch dynamic int8 linear" in capsys.readouterr().out
    assert Results.from_json(found.to_json()) == found
    assert report.reasons(found)


def test_a_crashing_child_does_not_fail_the_command(command, monkeypatch):
    monkeypatch.setattr(children, "PROGRAM", (sys.executable, "-c", "raise SystemExit('broken')"))
    code, found = command()
    assert code == 0
    (failed,) = [cell for cell in found.cells if cell.status == "failed"]
    assert failed.reason == "its process ended with status 1 and no results: broken"


def test_the_option_of_a_child_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(children, "end_with_parent", lambda: None)
    for text in ("{", '{"width": 1}'):
        assert cli.run(["--device", "cpu", "--shapes", "8,8", children.OPTION, text]) == 2
        assert "--child" in capsys.readouterr().err


def test_ceilings_survive_the_way_to_a_child():
    assert children.ceilings_from(json.dumps(asdict(CEILINGS))) == CEILINGS
