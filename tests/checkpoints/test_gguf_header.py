"""The header of a GGUF file is held to the file before anything is made of what it claims."""

import contextlib
import struct
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkernels.checkpoints import is_quantized, read_weights
from qkernels.checkpoints.gguf_header import read_header
from qkernels.errors import CheckpointError
from tests.checkpoints.test_golden import GOLDEN

pytest.importorskip("gguf", reason="GGUF files are read with the gguf package")
pytest.importorskip("transformers", reason="models come from transformers")

FILE = GOLDEN / "gguf-q4_k" / "model.gguf"
SIZES = {0: (1, 4), 2: (32, 18)}
"""Numbers and bytes of a block of F32 and of Q4_0."""


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(key, kind, form, content):
    return text(key) + struct.pack(f"<I{form}", kind, content)


def tensor(name="x", shape=(32, 4), kind=2, offset=0):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


def header(values=(), tensors=(), *, counts=None, version=3, magic=b"GGUF", data=72):
    said = (len(tensors), len(values)) if counts is None else counts
    head = magic + struct.pack("<IQQ", version, *said) + b"".join(values) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def array(kind, count, content=b""):
    return text("a") + struct.pack("<IIQ", 9, kind, count) + content


def nested(depth):
    return text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth


def test_tensors_are_what_was_written(tmp_path):
    values = [
        value("general.alignment", 4, "I", 64),
        value("llama.block_count", 4, "I", 2),
        text("name") + struct.pack("<I", 8) + text("a model"),
        array(8, 2, text("a") + text("bc")),
        array(5, 3, struct.pack("<3i", 1, -2, 3)),
    ]
    content = header(values, [tensor(), tensor("y", (2, 3), 0, 128)], data=0)
    content += b"\0" * (-len(content) % 64) + b"\0" * (128 + 24)
    (tmp_path / "x.gguf").write_bytes(content)
    found = read_header(tmp_path / "x.gguf", SIZES)
    assert [(t.name, t.shape, t.kind) for t in found] == [("x", (4, 32), 2), ("y", (3, 2), 0)]


WRONG = {
    "magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version 1": (header(version=1), "is of version 1, or in big-endian order: versions 2 and 3"),
    "big-endian": (header(version=3 << 24), "version 50331648, or in big-endian order"),
    "nothing": (b"GGUF", "ends before its version"),
    "petabytes of values": (header(counts=(0, 2**60)), f"ends before {2**60} values"),
    "petabytes of tensors": (header(counts=(2**60, 0)), f"ends before {2**60} tensors"),
    "a long key": (header([struct.pack("<Q", 2**60)]), f"has {2**60} bytes in a key"),
    "a key beyond the end": (header([struct.pack("<Q", 60000)]), "ends before a key: it is trunc"),
    "a key that is no text": (header([text(b"\xff\xfe")]), "for a key, which is no text"),
    "a long string": (
        header([text("s") + struct.pack("<IQ", 8, 2**62)]),
        "ends before s, a string: it is truncated or damaged",
    ),
    "a long array": (header([array(4, 2**60)]), f"ends before {2**60} values of a"),
    "an array of strings": (header([array(8, 2**40)]), f"ends before {2**40} values of a"),
    "arrays of arrays": (header([nested(100)]), "of the unknown type 9, or too deep: a"),
    "an unknown type": (header([value("k", 99, "I", 1)]), "of the unknown type 99, .*: k"),
    "layers without end": (
        header([value("llama.block_count", 4, "I", 2**31)]),
        f"says llama.block_count={2**31}, and holds 0 tensors",
    ),
    "alignment 0": (header([value("general.alignment", 4, "I", 0)]), "alignment=0, which is no"),
    "alignment 48": (header([value("general.alignment", 4, "I", 48)]), "which is no power of two"),
    "alignment a float": (
        header([value("general.alignment", 6, "f", 32.0)]),
        "alignment=None, which is no power",
    ),
    "twice the same": (header([], [tensor(), tensor()]), "names the tensor 'x' a second time"),
    "dimensions": (header([], [tensor(shape=(32,) * 5)]), "'x' with 5 dimensions"),
    "no dimension": (header([], [tensor(shape=())]), "'x' with 0 dimensions"),
    "no columns": (header([], [tensor(shape=(0, 2**60))]), r"'x' of sizes \[0, "),
    "petabytes of rows": (header([], [tensor(shape=(32, 2**60))]), "ends within 'x'"),
    "sizes whose product wraps": (header([], [tensor(shape=(2**32, 2**32))]), "ends within 'x'"),
    "an offset beyond the end": (header([], [tensor(offset=2**60)]), "ends within 'x'"),
    "half a block": (header([], [tensor(shape=(48, 2))]), "its rows are no blocks of 32"),
    "a type of nobody": (header([], [tensor(kind=99)]), "'x' of the unknown type 99"),
    "cut": (header([], [tensor()])[:-1], "ends within 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(tmp_path, case):
    content, named = WRONG[case]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as caught:
        read_header(tmp_path / "x.gguf", SIZES)
    assert str(tmp_path / "x.gguf") in str(caught.value) and len(str(caught.value)) < 400
    assert not is_quantized(tmp_path / "x.gguf")


def test_arrays_of_more_values_than_any_vocabulary_are_refused(tmp_path):
    """Each becomes an object in the package that reads the file."""
    (tmp_path / "x.gguf").write_bytes(header([array(0, 2**23 + 1, bytes(2**23 + 1))]))
    with pytest.raises(CheckpointError, match="more than 8388608 values in arrays, a among them"):
        read_header(tmp_path / "x.gguf", SIZES)


ENDS = st.sampled_from([0, 1, 3, 2**31, 2**32 - 1, 2**40, 2**60, 2**64 - 1])


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    bits=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 7)), max_size=3),
    numbers=st.lists(st.tuples(st.sampled_from([8, 16]) | st.integers(0, 5000), ENDS), max_size=2),
    cut=st.none() | st.integers(4, 40000),
)
def test_files_load_or_are_refused(tmp_path, bits, numbers, cut):
    content = bytearray(FILE.read_bytes())
    for place, bit in bits:
        content[place] ^= 1 << bit
    for place, number in numbers:
        content[place : place + 8] = number.to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(content[:cut])
    is_quantized(path)
    with contextlib.suppress(CheckpointError):
        read_weights(path)


LIMITED = """
import resource, sys, time
import qkernels as qk
from qkernels.errors import CheckpointError
import gguf, transformers, transformers.modeling_gguf_pytorch_utils
qk.load_model(sys.argv[1])
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 29),) * 2)
for path in sys.argv[2:]:
    try:
        qk.load_model(path)
    except CheckpointError:
        print("refused", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_headers_of_petabytes_take_no_memory(tmp_path):
    """Within 512 MiB beyond what a model that loads has taken."""
    content = FILE.read_bytes()
    claims = {
        "tensors": (8, 2**60),
        "values": (16, 2**60),
        "layers": (content.index(b"llama.block_count") + 17 + 4, 2**31),
        "tokens": (content.index(b"tokenizer.ggml.tokens") + 21 + 8, 2**60),
        "length": (24, 2**60),
    }
    paths = []
    for name, (place, number) in claims.items():
        path = tmp_path / f"{name}.gguf"
        size = 4 if name == "layers" else 8
        damaged = bytearray(content)
        damaged[place : place + size] = number.to_bytes(size, "little")
        path.write_bytes(damaged)
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, FILE, *paths], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["refused"] * len(claims)
