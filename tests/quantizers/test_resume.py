"""A run that was interrupted anywhere goes on from its folder with the same result."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels.errors import CheckpointError
from qkernels.quantizers import resume
from qkernels.quantizers.method import Method
from qkernels.quantizers.methods import METHODS
from tests.plain_model import TOKENS, Model, snapshot, unchanged

BATCHES = [TOKENS, TOKENS[:1, :5]]


def fresh():
    torch.manual_seed(7)
    return Model()


def quantized(folder=None, model=None, scheme="w8a8-static", method="rtn", **options):
    """The report and every tensor of the quantized model."""
    model = fresh() if model is None else model
    options = {"calibration": BATCHES, **options}
    report = qk.quantize_model(model, method, scheme, resume=folder, **options)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return report, state


def same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def blocks_in(folder):
    return sorted(path.name for path in folder.glob("block-*"))


def interrupt_at(last):
    def progress(done, total, name):
        if done == last:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("calibration", [None, BATCHES])
@pytest.mark.parametrize("last", range(7))
def test_an_interrupted_run_goes_on(tmp_path, calibration, last):
    options = {"calibration": calibration, "scheme": "w8a8-static" if calibration else "w4a16-g24"}
    expected = quantized(**options)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "run", model, **options, progress=interrupt_at(last))
    unchanged(model, before)
    assert blocks_in(tmp_path / "run") == [f"block-{i:04d}.safetensors" for i in range(last // 2)]
    made = []
    real = resume.ResumeFolder.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            resume.ResumeFolder, "save", lambda self, *a: (made.append(a[0]), real(self, *a))
        )
        seen = []
        again = quantized(tmp_path / "run", model, **options, progress=lambda *a: seen.append(a[0]))
    same(again, expected)
    assert made == list(range(last // 2, 3))
    assert seen == list(range(7))
    # A finished run is taken from its folder whole.
    same(quantized(tmp_path / "run", **options), expected)


def test_interrupted_again_and_again(tmp_path):
    for last in (3, 2, 5, 1):
        with pytest.raises(KeyboardInterrupt):
            quantized(tmp_path, progress=interrupt_at(last))
    same(quantized(tmp_path), quantized())


@pytest.mark.parametrize("keep", [0, 5, 40, 400, -1])
def test_a_truncated_block_is_made_again(tmp_path, keep):
    expected = quantized(tmp_path)
    file = tmp_path / "block-0001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    same(quantized(tmp_path), expected)
    assert file.read_bytes() == content


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_truncated_run_file_is_named(tmp_path, keep):
    quantized(tmp_path)
    file = tmp_path / "run.json"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"run\.json is damaged: remove"):
        quantized(tmp_path)
    for content in ("[]", "{}", "3"):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
            quantized(tmp_path)


@pytest.mark.parametrize("what", ["write", "rename"])
@pytest.mark.parametrize("number", range(3))
def test_a_kill_while_a_block_is_stored(tmp_path, monkeypatch, what, number):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def half(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    real, saved = resume.ResumeFolder.save, []

    def save(self, n, block):
        if n == number:
            name, instead = ("save_file", half) if what == "write" else ("_rename", killed)
            monkeypatch.setattr(resume, name, instead)
        real(self, n, block)
        saved.append(n)

    monkeypatch.setattr(resume.ResumeFolder, "save", save)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert saved == list(range(number))
    monkeypatch.undo()
    same(quantized(tmp_path), quantized())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_kill_before_the_folder_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "_rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path)
    monkeypatch.undo()
    same(quantized(tmp_path), quantized())


def other_weights():
    model = fresh()
    model.blocks[2].down.weight.data[71, 95] += 1e-3
    return model


def other_modules():
    model = fresh()
    model.norm = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scheme": "w8a16"}, "the schemes of layers"),
        ({"overrides": {"blocks.1.up": "w8a16"}}, "the schemes of layers"),
        ({"exclude": ["blocks.1.up"]}, "the schemes of layers"),
        ({"backend": "reference"}, "the backend"),
        ({"observer": "mse"}, "the observer"),
        ({"calibration": BATCHES[:1]}, "the calibration batches"),
        ({"calibration": BATCHES[::-1]}, "the calibration batches"),
        ({"calibration": [TOKENS, TOKENS[:1, 1:6]]}, "the calibration batches"),
        ({"calibration": [{"tokens": batch} for batch in BATCHES]}, "the calibration batches"),
        ({"make": other_weights}, "the model"),
        ({"make": other_modules}, "the model"),
        ({"method": "twin"}, "the recipe"),
        ({"scheme": "w8a8", "method": "twin"}, "the recipe and the schemes of layers"),
    ],
)
def test_a_folder_of_another_run_is_an_error(tmp_path, monkeypatch, options, named):
    twin = Method(name="twin", title="", quantize=METHODS["rtn"].quantize)
    monkeypatch.setitem(METHODS, "twin", twin)
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path, progress=interrupt_at(2))
    model = options.pop("make", fresh)()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"of a run that differs in {named}; give"):
        quantized(tmp_path, model, **options)
    unchanged(model, before)
    same(quantized(tmp_path), quantized())


def test_a_folder_of_another_version_or_of_something_else(tmp_path):
    quantized(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 0}))
    with pytest.raises(CheckpointError, match="differs in another version of qkernels"):
        quantized(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"it holds other files and no run\.json"):
        quantized(tmp_path)
    with pytest.raises(CheckpointError, match="it is no folder"):
        quantized(file)


def test_what_was_rewritten_comes_back(tmp_path, monkeypatch):
    def halve(task, parameters):
        task.rewrite("up.weight", task.module.up.weight / 2)
        task.rewrite("up.bias", task.module.up.bias / 2)
        task.rewrite("down.weight", task.module.down.weight * 2)

    def shift(task, parameters):
        task.module.get_parameter("norm")
        task.rewrite("norm", task.module.norm + 1)

    for name, prepare in (("halve", halve), ("shift", shift)):
        monkeypatch.setitem(METHODS, name, Method(name=name, title="", prepare_block=prepare))

    def model():
        made = fresh()
        for block in made.blocks:
            block.norm = nn.Parameter(torch.ones(3))
        return made

    expected = quantized(None, model(), method="halve+shift")
    assert torch.equal(expected[1]["blocks.1.norm"], torch.full((3,), 2.0))
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path, model(), method="halve+shift", progress=interrupt_at(4))
    same(quantized(tmp_path, model(), method="halve+shift"), expected)


def test_unreached_and_shared_layers_come_back(tmp_path):
    def model():
        made = fresh()
        made.blocks[0].rare = nn.Linear(72, 72)
        made.blocks[2].up = made.blocks[0].up
        made.blocks[0].again = made.blocks[0].down
        return made

    expected = quantized(None, model())
    assert list(expected[0].unreached) == ["blocks.0.rare"]
    for last in range(8):
        folder = tmp_path / str(last)
        with pytest.raises(KeyboardInterrupt):
            quantized(folder, model(), progress=interrupt_at(last))
        made = model()
        same(quantized(folder, made), expected)
        assert made.blocks[2].up is made.blocks[0].up
        assert made.blocks[0].again is made.blocks[0].down


def test_a_model_that_is_run_whole_begins_again(tmp_path):
    class Repeated(Model):
        def forward(self, tokens):
            return super().forward(tokens) + self.blocks[0](self.embed(tokens))[..., :50]

    def model():
        torch.manual_seed(7)
        return Repeated()

    expected = quantized(None, model())
    assert expected[0].whole_model is not None
    # Blocks of the first attempt, which cannot be used, are in the folder by then.
    seen, folder = [], tmp_path / "run"

    def progress(done, total, name):
        seen.append(done)
        if seen.count(0) == 2 and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(folder, model(), progress=progress)
    assert blocks_in(folder) == ["block-0000.safetensors"]
    assert json.loads((folder / "run.json").read_text())["whole_model"] == expected[0].whole_model
    seen.clear()
    same(quantized(folder, model(), progress=lambda *a: seen.append(a[0])), expected)
    assert seen == list(range(7))


SCRIPT = """
import sys, torch
from tests.quantizers.test_resume import quantized
quantized(sys.argv[1], progress=lambda done, total, name: print(done, flush=True))
"""


def test_a_process_killed_at_a_random_moment_leaves_a_folder_to_resume(tmp_path):
    expected = quantized()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    for line in process.stdout:
        if int(line) >= 3:
            process.kill()
            break
    process.wait()
    assert blocks_in(tmp_path)[:1] == ["block-0000.safetensors"]
    same(quantized(tmp_path), expected)


def test_other_files_stay(tmp_path):
    for name in ("thesis.tmp", "other.txt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"it holds other files and no run\.json"):
        quantized(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tmp", "other.txt", "folder.tmp"}


def test_a_folder_is_of_one_run_at_a_time(tmp_path):
    def again(done, total, name):
        if done == 3:
            with pytest.raises(CheckpointError, match="another run uses"):
                quantized(tmp_path)

    expected = quantized()
    same(quantized(tmp_path, progress=again), expected)
    # And of the next one when that has ended, well or not.
    with pytest.raises(CheckpointError, match="differs in"):
        quantized(tmp_path, scheme="w8a8")
    same(quantized(tmp_path), expected)
