"""The sources that instantiate kernels: one for each decoder of each, to compile side by side.

The decoders are those that visit_decoder (weights/decode.cuh) hands out. Whatever compiles the
kernels calls `write` first, which leaves the sources in build/generated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

CUDA = Path(__file__).resolve().parent
FOLDER = CUDA.parents[1] / "build" / "generated"

_TAG = re.compile(r"DecoderTag<(\w+), (true|false)>\(\)")

_TEXT = """\
#include "cuda/weight_only/{kernel}.cuh"

namespace qkernels {{

template const char* {function}<{decoder}, {real_zeros}>({arguments});

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


def sources() -> dict[str, str]:
    """The text of each source by its name."""
    tags = _TAG.findall((CUDA / "weights" / "decode.cuh").read_text())
    assert tags, "decode.cuh has no DecoderTag<decoder, true or false>()"
    return {
        f"{kernel}_{decoder.lower()}{'_real_zeros' if real_zeros == 'true' else ''}.cu": (
            _TEXT.format(
                kernel=kernel,
                function=function,
                arguments=arguments,
                decoder=decoder,
                real_zeros=real_zeros,
            )
        )
        for kernel, (function, arguments) in _KERNELS.items()
        for decoder, real_zeros in tags
        if kernel != "grad" or decoder not in _WITHOUT_GRAD
    }


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
