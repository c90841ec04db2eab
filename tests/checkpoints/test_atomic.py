"""A folder appears as a whole or not at all, whatever ends the process that writes it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qkernels.checkpoints import atomic
from qkernels.checkpoints.atomic import new_folder
from qkernels.errors import CheckpointError


def write(target: Path, content: str = "whole") -> None:
    with new_folder(target) as folder:
        assert not (target / "a").exists()
        (folder / "a").write_text(content)
        (folder / "config.json").write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


WHOLE = {"a": "whole", "config.json": "whole"}


def test_it_takes_the_place_of_nothing_or_of_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("new", "empty", "deep/er"):
        write(tmp_path / name)
        assert contents(tmp_path / name) == WHOLE
    assert contents(tmp_path / "link") == WHOLE
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty", "deep", "link"}


def test_what_is_there_stays(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("years of work")
    (tmp_path / "file").write_text("one file")
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match=f"{name} exists and is not an empty folder"):
            write(tmp_path / name)
    assert contents(tmp_path / "full") == {"thesis": "years of work"}
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, CheckpointError])
@pytest.mark.parametrize("there", [False, True])
def test_an_error_leaves_nothing(tmp_path, error, there):
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:  # noqa: PT012
        (folder / "a").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * there
    assert not there or contents(tmp_path / "out") == {}


KILLED = """
import os, signal, sys
from pathlib import Path
from qkernels.checkpoints.atomic import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("half")
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), "die"], check=False)
    assert killed.returncode == -9
    assert not out.exists()
    assert [path.name[:12] for path in tmp_path.iterdir()] == [".out.saving-"]
    write(out)
    assert contents(out) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_living_process_writes_stays(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out), "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "writing\n"
        write(out)
        assert len(list(tmp_path.iterdir())) == 2
        _, errors = other.communicate("\n")
    assert "out cannot be written: Directory not empty" in errors
    assert contents(out) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("reason", ["mounted", "parent closed"])
def test_a_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch, reason):
    out = tmp_path / "out"
    out.mkdir()
    if reason == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        monkeypatch.setattr(atomic.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OSError), new_folder(out) as folder:  # noqa: PT012
        assert folder.parent == out
        (folder / "a").write_text("half")
        raise OSError
    assert contents(out) == {}
    left = out / ".out.saving-0123"
    left.mkdir()
    number, renamed, rename = out.stat().st_ino, [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda a, b: (renamed.append(b.name), rename(a, b)))
    with new_folder(out) as folder:
        for name in ("config.json", "a", "z"):
            (folder / name).write_text("whole")
    # Without a config.json it is no model yet.
    assert sorted(renamed[:2]) == ["a", "z"] and renamed[2:] == ["config.json"]
    assert contents(out) == {**WHOLE, "z": "whole"} and out.stat().st_ino == number


def test_it_is_open_to_others_as_any_folder_is(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
