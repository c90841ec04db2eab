"""csrc/cuda/instantiate.py: the sources that each decoder is instantiated by."""

import os
import re

from csrc.cuda import instantiate

DECODE = (instantiate.CUDA / "weights" / "decode.cuh").read_text()
INT8_DECODE = (instantiate.CUDA / "int8" / "decode.cuh").read_text()


def test_each_decoder_that_is_handed_out_has_one_source_of_each_kernel():
    visit = DECODE[DECODE.index("const char* visit_decoder(") :]
    handed_out = re.findall(r"visit\(DecoderTag<([^>]+)>", visit)
    assert len(handed_out) == visit.count("visit(") >= 8
    sources = instantiate.sources()
    # Gradients of 2 and 3 bits go by way of the dense weight.
    with_grad = [tag for tag in handed_out if tag.split(",")[0] not in ("Int2", "Int3")]
    own = INT8_DECODE[INT8_DECODE.index("const char* visit_int8(") :]
    integers = re.findall(r"visit\(Int8Tag<([^>]+)>", own)
    assert len(integers) == own.count("visit(") == 6
    for launch, tags in (
        ("launch_decoder", handed_out),
        ("launch_grad", with_grad),
        ("launch_int8", integers),
    ):
        instantiated = [
            found
            for text in sources.values()
            for found in re.findall(rf"template const char\* {launch}<([^>]+)>", text)
        ]
        assert sorted(instantiated) == sorted(tags)
    assert len(sources) == len({*handed_out}) + len({*with_grad}) + len({*integers})


def test_a_source_is_written_where_its_text_changes(tmp_path):
    folder = tmp_path / "generated"
    paths = instantiate.write(folder)
    assert sorted(folder.iterdir()) == sorted(paths)
    kept, changed, *_, lost = paths
    long_ago = 1_000_000_000
    for path in paths:
        os.utime(path, (long_ago, long_ago))
    changed.write_text("// of another revision\n")
    lost.unlink()
    assert instantiate.write(folder) == paths
    assert {path.name: path.read_text() for path in paths} == instantiate.sources()
    assert kept.stat().st_mtime == long_ago
    assert changed.stat().st_mtime > long_ago
