"""A run from folder to folder that is killed or out of room goes on with the same result."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qkernels.checkpoints import atomic, store
from qkernels.errors import CheckpointError
from qkernels.quantizers import resume, streaming
from tests.quantizers.stream_folders import batches, contents, streamed, write_model


class Killed(BaseException):
    """Nothing catches it."""


def kill_at(patch, last):
    """Makes the write with the number `last` the last thing that happens; those before it are
    whole, and of itself there is half."""
    done = []

    def counted(module, name, half):
        real = getattr(module, name)

        def write(*args, **kwargs):
            done.append(name)
            if len(done) > last:
                half(*args)
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(module, name, write)

    counted(resume, "save_file", lambda tensors, path: path.write_bytes(b"half"))
    counted(resume, "_rename", lambda *_: None)
    counted(store, "save_file", lambda tensors, path: path.write_bytes(b"half"))
    counted(streaming, "on_disk", lambda *_: None)
    counted(atomic, "_take_place", lambda *_: None)
    counted(streaming.shutil, "rmtree", lambda *_: None)
    return done


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_kill_at_any_write(tmp_path, calibrated):
    llama = write_model(tmp_path / "source", num_hidden_layers=2)
    method, options = ("gptq", {"calibration": batches()[:1]}) if calibrated else ("rtn", {})
    options["max_shard_size"] = "5GB"
    expected = streamed(llama, tmp_path / "expected", method, **options)
    files = contents(tmp_path / "expected")
    number, finished = 0, False
    while not finished:
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, number)
            try:
                streamed(llama, place / "out", method, **options)
                finished = True
            except Killed:
                assert not (place / "out").exists() or contents(place / "out") == files
        if not finished and not (place / "out").exists():
            assert streamed(llama, place / "out", method, **options) == expected
        assert contents(place / "out") == files
        number += 1
    # Blocks, files and folders, each written and renamed.
    assert number > 10


def test_killed_again_and_again(llama, tmp_path):
    options = {"calibration": batches()[:1]}
    streamed(llama, tmp_path / "expected", "awq", **options)
    for last in (0, 3, 2, 5, 1, 4):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, last)
            with pytest.raises(Killed):
                streamed(llama, tmp_path / "out", "awq", **options)
    streamed(llama, tmp_path / "out", "awq", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


SCRIPT = """
import os, signal, sys, torch
import qkernels as qk
from qkernels.checkpoints import store
from tests.quantizers.stream_folders import batches, streamed

kind, source, out = sys.argv[1:]
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
def progress(done, total, name):
    if kind == "block" and done == 10:
        die()
if kind == "shard":
    store.ShardWriter.finish = die
streamed(source, out, "gptq", calibration=batches(), progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
@pytest.mark.parametrize("kind", ["block", "shard"])
def test_a_process_that_is_killed(llama, tmp_path, kind):
    options = {"calibration": batches()}
    streamed(llama, tmp_path / "expected", "gptq", **options)
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", SCRIPT, kind, str(llama), str(out)]
    # Another number of threads may sum otherwise.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run(arguments, env={**os.environ, **threads}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    finished = list((tmp_path / "out.unfinished").glob("block-*.safetensors"))
    assert len(finished) == {"block": 1, "shard": 3}[kind]
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "save_file", lambda *a, **k: made.append(save_file(*a, **k)))
        streamed(llama, out, "gptq", **options)
    assert len(made) == 3 - len(finished)
    assert contents(out) == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


def test_an_interrupt_keeps_what_is_done(llama, tmp_path):
    def interrupt(done, total, name):
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(llama, tmp_path / "out", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.unfinished"]
    assert (tmp_path / "out.unfinished" / "block-0000.safetensors").exists()


def test_a_full_disk(llama, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    expected = streamed(llama, tmp_path / "expected")
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*blocks finished before are kept"):
        streamed(llama, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(CheckpointError, match=r"part-0 cannot be written.*No space left"):
        streamed(llama, tmp_path / "out")
    monkeypatch.undo()

    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(streaming, "on_disk", no_room)
    with pytest.raises(CheckpointError, match="out cannot be written: No space left"):
        streamed(llama, tmp_path / "out")
    monkeypatch.undo()
    assert len(list((tmp_path / "out.unfinished").glob("block-*"))) == 3
    assert streamed(llama, tmp_path / "out") == expected
