"""Reading tensors one by one, and writing them in shards."""

import json
import os
import resource
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkernels.checkpoints import store
from qkernels.checkpoints.store import INDEX_FILE, WEIGHTS_FILE, ShardWriter, Store, shard_bytes
from qkernels.errors import CheckpointError

TENSORS = {
    "bf16": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "scalar": torch.tensor(1.5),
    "none": torch.empty(0, 4),
    "bool": torch.tensor([True, False]),
    "fp8": torch.arange(9.0).to(torch.float8_e4m3fn),
    "int64": torch.tensor([-(2**40), 7]),
    "large": torch.randn(5000),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / WEIGHTS_FILE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Three tensors in two files, and an index."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "two.safetensors")
    files = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tmp_path


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("read_bytes", [16 << 20, 1000, 7])
def test_tensors_come_one_by_one_as_they_were_written(folder, monkeypatch, read_bytes):
    monkeypatch.setattr(store, "READ_BYTES", read_bytes)
    opened = Store(folder)
    assert set(opened) == set(TENSORS) and len(opened) == len(TENSORS)
    assert "large" in opened and "other" not in opened
    for name, tensor in TENSORS.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert opened.dtype(name) == tensor.dtype
        assert same(opened.get(name), tensor)
    # Nothing of a file stays open or mapped: it may be replaced while the model is in use.
    (folder / WEIGHTS_FILE).write_bytes(b"")
    assert not any(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_only_headers_are_read_until_a_tensor_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *a, **k: pytest.fail("reads a tensor"))
    opened = Store(folder)
    assert opened.shape("large") == (5000,)


def test_an_index_says_which_files_count(sharded):
    save_file({"a": torch.zeros(2), "d": torch.zeros(1)}, sharded / WEIGHTS_FILE)
    save_file({"c": torch.zeros(4)}, sharded / "consolidated.safetensors")
    opened = Store(sharded)
    assert sorted(opened) == ["a", "b", "c"]
    assert all(bool(opened.get(name).all()) for name in opened)


def test_an_index_says_which_of_two_tensors_of_one_name_counts(sharded):
    save_file({"c": torch.ones(4), "a": torch.zeros(2)}, sharded / "two.safetensors")
    assert torch.equal(Store(sharded).get("a"), torch.ones(2))


def test_model_safetensors_counts_before_other_files(folder):
    save_file({"scalar": torch.tensor(0.0)}, folder / "a.safetensors")
    assert float(Store(folder).get("scalar")) == 1.5
    (folder / WEIGHTS_FILE).unlink()
    assert list(Store(folder)) == ["scalar"]


@pytest.mark.parametrize(
    "file", ["/etc/x.safetensors", "../x.safetensors", "a/../../x", "C:\\x", ""]
)
def test_an_index_cannot_name_files_elsewhere(sharded, file):
    edit_index(sharded, c=file)
    with pytest.raises(CheckpointError, match=r"index\.json names the file .*outside of the"):
        Store(sharded)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: edit_index(f, c="three.safetensors"), "three.safetensors does not exist"),
        (lambda f: edit_index(f, d="two.safetensors"), "two.safetensors lacks d, which"),
        (lambda f: edit_index(f, c=5), r"weight_map\['c'\] of .* must be a string, got 5"),
        (lambda f: (f / INDEX_FILE).write_text("{"), "index.json is not valid JSON"),
        (lambda f: (f / INDEX_FILE).write_text("[]"), "index.json holds a list"),
        (lambda f: (f / INDEX_FILE).write_text("{}"), "weight_map of .* must be an object"),
        (lambda f: (f / INDEX_FILE).write_text("[" * 100_000), "index.json is not valid JSON"),
        (lambda f: (f / INDEX_FILE).unlink(), r"several .safetensors files \(one.safet.*, two.sa"),
        (lambda f: (f / "two.safetensors").write_bytes(b"x"), "two.safetensors is damaged or tr"),
    ],
)
def test_a_damaged_index_is_named(sharded, damage, named):
    damage(sharded)
    with pytest.raises(CheckpointError, match=named):
        Store(sharded)


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        header(b"[" * 50_000),
        header(b"nonsense"),
        # It claims a petabyte, which costs nothing.
        header(
            b'{"a":{"dtype":"F32","shape":[262144,1073741824],"data_offsets":[0,1125899906842624]}}'
        ),
        header(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"x" * 8),
        header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}', b"x" * 8),
        header(b'{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}', b"x" * 8),
    ],
)
def test_damaged_headers_are_named(tmp_path, content):
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        Store(tmp_path)


def test_files_that_are_not_there_or_no_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file$"):
        Store(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        Store(tmp_path)
    (tmp_path / WEIGHTS_FILE).mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Store(tmp_path)


def test_a_file_that_is_cut_after_it_was_opened(folder):
    opened = Store(folder)
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors ends within large"):
        opened.get("large")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        opened.get("large")


def test_what_is_taken_must_have_its_shape_and_type(folder):
    opened = Store(folder)
    assert same(opened.take("bf16", (2, None), (torch.bfloat16, torch.int8)), TENSORS["bf16"])
    for shape, dtypes in (((2, 4), ()), ((6,), ()), ((2, 3), (torch.float16,))):
        with pytest.raises(CheckpointError, match=r"bf16 must be .*got bfloat16 \[2, 3\]"):
            opened.take("bf16", shape, dtypes)
    with pytest.raises(CheckpointError, match="gone is missing"):
        opened.take("gone", ())


def written(folder: Path, size: int | str) -> list[str]:
    writer = ShardWriter(folder, size)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish()
    return sorted(path.name for path in folder.iterdir())


def test_one_shard_needs_no_index(tmp_path):
    assert written(tmp_path, "5GB") == [WEIGHTS_FILE]
    read = load_file(tmp_path / WEIGHTS_FILE)
    assert all(same(read[name], tensor) for name, tensor in TENSORS.items())


def test_several_shards_have_an_index(tmp_path):
    files = written(tmp_path, 30)
    parts = [name for name in files if name != INDEX_FILE]
    assert parts == [
        f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)
    ]
    held = {name: load_file(tmp_path / name) for name in parts}
    for shard in held.values():
        # A tensor larger than the limit has a shard of its own.
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 30
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert {n: f for f, shard in held.items() for n in shard} == index["weight_map"]
    opened = Store(tmp_path)
    assert all(same(opened.get(name), tensor) for name, tensor in TENSORS.items())


def test_no_more_than_a_shard_is_held(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    for i in range(10):
        writer.add(str(i), torch.ones(100))
        assert writer._held <= 1000 and len(writer._shard) <= 2
    writer.finish()
    assert len(Store(tmp_path)) == 10


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        written(tmp_path, 30)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_views_of_one_storage_are_written_as_what_they_are(tmp_path):
    x = torch.arange(8.0)
    writer = ShardWriter(tmp_path, "1MB")
    views = {"all": x, "again": x, "tail": x[4:], "columns": x.view(2, 4).t()}
    for name, view in views.items():
        writer.add(name, view)
    writer.finish()
    assert all(same(Store(tmp_path).get(name), view) for name, view in views.items())


def test_a_name_is_written_once(tmp_path):
    for size in (1, "1GB"):
        writer = ShardWriter(tmp_path, size)
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        with pytest.raises(CheckpointError, match="two tensors of the model are called a"):
            writer.add("a", torch.ones(1))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    writer = ShardWriter(tmp_path / "gone", "1GB")
    writer.add("a", torch.ones(1))
    with pytest.raises(CheckpointError, match=r"part-0 cannot be written: .*No such file"):
        writer.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"part-0 cannot be written: .*File too large"):
            written(tmp_path, "1GB")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("3K", 3000)],
)
def test_sizes(size, expected):
    assert shard_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -1, "0GB", "GB", "5 gigs", "", True, None])
def test_what_is_no_size(size):
    with pytest.raises(CheckpointError, match="is no size: give bytes"):
        shard_bytes(size)
