"""The sources that instantiate kernels: one for each decoder of each, to compile side by side.

The decoders are those that visit_decoder (weights/decode.cuh) and visit_int8 (int8/decode.cuh) hand
out. Whatever compiles the kernels calls `write` first, which leaves the sources in build/generated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CUDA = Path(__file__).resolve().parent
FOLDER = CUDA.parents[1] / "build" / "generated"

_TAG = re.compile(r"DecoderTag<(\w+), (true|false)>\(\)")

_TEXT = """\
#include "cuda/{folder}/{kernel}.cuh"

namespace qkernels {{

template const char* {function}<{decoder}, {flag}>({arguments});

}}  // namespace qkernels
"""

_KERNELS = {
    "mma": (
        "launch_decoder",
        "const WeightOnlyParameters&, FloatType, int, unsigned, int, Stream",
    ),
    "grad": ("launch_grad", "GradParameters, FloatType, int, unsigned, Stream"),
}
"""By the header in weight_only/: the function that is instantiated, and its arguments."""


_WITHOUT_GRAD = ("Int2", "Int3")
"""Decoders of weights that weight_only_grad does not take."""


_INT8_TAG = re.compile(r"Int8Tag<(\w+), (true|false)>\(\)")


def _tags(header: str, tag: re.Pattern[str]) -> list[tuple[str, str]]:
    """The decoders that a header hands out, each with its flag."""
    tags = tag.findall((CUDA / header).read_text())
    assert tags, f"{header} has no {tag.pattern}"
    return list(dict.fromkeys(tags))


def sources() -> dict[str, str]:
    """The text of each source by its name."""
    texts = {
        f"{kernel}_{decoder.lower()}{'_real_zeros' if flag == 'true' else ''}.cu": (
            _TEXT.format(
                folder="weight_only",
                kernel=kernel,
                function=function,
                arguments=arguments,
                decoder=decoder,
                flag=flag,
            )
        )
        for kernel, (function, arguments) in _KERNELS.items()
        for decoder, flag in _tags("weights/decode.cuh", _TAG)
        if kernel != "grad" or decoder not in _WITHOUT_GRAD
    }
    for decoder, flag in _tags("int8/decode.cuh", _INT8_TAG):
        name = f"int8_{decoder.lower()}{'_grouped' if flag == 'true' else ''}.cu"
        texts[name] = _TEXT.format(
            folder="int8",
            kernel="mma",
            function="launch_int8",
            arguments="const Int8Parameters&, int, unsigned, int, Stream",
            decoder=decoder,
            flag=flag,
        )
    return texts


def write(folder: Path = FOLDER) -> list[Path]:
    """The sources in `folder`; one that is there with the same text keeps its time."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in sources().items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            # In one step: another process may be compiling it.
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(text)
            part.replace(path)
        paths.append(path)
    return paths
