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


def write(target: Path, content: str = "whole", replace: bool = False) -> None:
    with new_folder(target, replace=replace) as folder:
        assert replace or not (target / "a").exists()
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
    for name, what in (("full", "not an empty folder"), ("file", "no folder")):
        with pytest.raises(CheckpointError, match=f"{name} exists and is {what}"):
            write(tmp_path / name)
    with pytest.raises(CheckpointError, match="file exists and is no folder"):
        write(tmp_path / "file", replace=True)
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


@pytest.fixture(params=["one step", "two steps"])
def steps(request, monkeypatch):
    """With a system that exchanges folders, and with one that does not."""
    if request.param == "two steps":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return request.param


def test_an_older_folder_is_there_until_the_new_one_is(tmp_path, steps):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "b").write_text("old")
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), new_folder(out, replace=True) as folder:  # noqa: PT012
            (folder / "a").write_text("half")
            assert [path.name for path in out.iterdir()] == ["deep"]
            raise error
    assert (out / "deep" / "b").read_text() == "old"
    write(out, replace=True)
    assert contents(out) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_folders_are_exchanged(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system does not exchange folders")
    assert contents(tmp_path / "a") == {"b": "b"} and contents(tmp_path / "b") == {"a": "a"}
    with pytest.raises(FileNotFoundError):
        atomic._exchange(tmp_path / "a", tmp_path / "gone")


REPLACING = """
import os, shutil, signal, sys, types
from pathlib import Path
package, out, steps, point = sys.argv[1:]
# The module alone: the whole package takes a second to import.
for name, folder in (("qkernels", package), ("qkernels.checkpoints", package + "/checkpoints")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
import qkernels.checkpoints.atomic as atomic
if steps == "two steps":
    atomic._exchange = lambda a, b: False
left = int(point)
def dying(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
# Each point at which the folders change, before and after.
for owner, name in ((atomic, "_exchange"), (Path, "rename"), (os, "unlink"), (os, "rmdir"),
                    (atomic, "_lock"), (Path, "mkdir")):
    setattr(owner, name, dying(getattr(owner, name)))
with atomic.new_folder(Path(out), replace=True) as folder:
    for name in ("a", "config.json"):
        dying(lambda: None)()
        (folder / name).write_text("new")
left = 0
"""


def test_killed_at_any_point_it_leaves_the_old_or_the_new(tmp_path, steps):
    out, seen, package = tmp_path / "out", [], Path(atomic.__file__).parents[1]
    for point in range(1, 40):
        write(out, "old", replace=True)
        command = [sys.executable, "-c", REPLACING, package, out, steps, str(point)]
        done = subprocess.run(command, check=False)
        if out.exists() or steps == "one step":
            seen.append(contents(out)["a"])
            assert contents(out) == {"a": seen[-1], "config.json": seen[-1]}
        else:
            # Between the two steps: the old one is brought back by the next that writes there.
            seen.append("none")
            with pytest.raises(KeyboardInterrupt), new_folder(out, replace=True):
                raise KeyboardInterrupt
            assert contents(out) == {"a": "old", "config.json": "old"}
        with new_folder(out, replace=True) as folder:
            assert {path.name for path in tmp_path.iterdir()} == {"out", folder.name}
            (folder / "a").write_text("next")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        if done.returncode == 0:
            break
        assert done.returncode == -9
    expected = {"old", "new"} if steps == "one step" else {"old", "none", "new"}
    assert set(seen) == expected and point > 6


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
    with pytest.raises(CheckpointError, match="not an empty folder"):
        write(out)
    (out / "deep").mkdir()
    write(out, "newer", replace=True)
    assert contents(out) == {"a": "newer", "config.json": "newer"}
    assert out.stat().st_ino == number


def test_it_is_open_to_others_as_any_folder_is(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
