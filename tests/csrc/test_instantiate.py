"""csrc/cuda/instantiate.py: the sources that each decoder is instantiated by."""

import os
import re

from csrc.cuda import instantiate

DECODE = (instantiate.CUDA / "weights" / "decode.cuh").read_text()


def test_each_decoder_that_is_handed_out_has_one_source_of_each_kernel():
    visit = DECODE[DECODE.index("const char* visit_decoder(") :]
    handed_out = re.findall(r"visit\(DecoderTag<([^>]+)>", visit)
    assert len(handed_out) == visit.count("visit(") >= 8
    sources = instantiate.sources()
    # Gradients of 2 and 3 bits go by way of the dense weight.
    with_grad = [tag for tag in handed_out if tag.split(",")[0] not in ("Int2", "Int3")]
    for launch, tags in (("launch_decoder", handed_out), ("launch_grad", with_grad)):
        instantiated = [
            found
            for text in sources.values()
            for found in re.findall(rf"template const char\* {launch}<([^>]+)>", text)
        ]
        assert instantiated == tags
    assert len(sources) == len(set(handed_out)) + len(set(with_grad))


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
