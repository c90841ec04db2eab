"""Builds the CUDA kernels with the emulator: python csrc/emulator/build.py OUTPUT.so

With --sanitize, under AddressSanitizer and UBSan; such a library is loaded into a Python that was
started with `--preload` of this script in LD_PRELOAD. Objects are kept beside the output, and made
again where a source or any header is newer.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

CSRC = Path(__file__).resolve().parent.parent
SOURCES = (
    *("emulator/*.cpp", "cuda/**/*.cu", "cuda/**/*.cpp", "bindings/cuda/*.cpp"),
    "bindings/preparation.cpp",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# libstdc++ too, or the sanitizers find no function that throws.
PRELOADED = ("libasan.so", "libubsan.so", "libstdc++.so.6")


def compile_one(source: Path, target: Path, flags: list[str], newest_header: float) -> None:
    newest = max(newest_header, source.stat().st_mtime)
    if target.exists() and target.stat().st_mtime > newest:
        return
    command = [get_cxx_compiler(), "-x", "c++", "-c", str(source), "-o", str(target), *flags]
    subprocess.run(command, check=True)


def build(output: Path, sanitize: bool, jobs: int) -> None:
    objects = output.parent / (output.stem + ".objects")
    objects.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-DQKERNELS_EMULATOR", f"-I{CSRC}"]
    # Loops marked `#pragma unroll` are for nvcc.
    flags += ["-Wno-unknown-pragmas", *(f"-isystem{path}" for path in include_paths())]
    flags += SANITIZERS if sanitize else ()
    headers = [path for kind in ("h", "cuh") for path in CSRC.rglob(f"*.{kind}")]
    newest_header = max(path.stat().st_mtime for path in (*headers, Path(__file__)))
    # The generated sources, which are the largest, first: none of them is left to the end alone.
    sources = runpy.run_path(str(CSRC / "cuda" / "instantiate.py"))["write"]()
    sources += sorted(path for pattern in SOURCES for path in CSRC.glob(pattern))
    targets = [
        objects / (source.relative_to(CSRC.parent).as_posix().replace("/", "_") + ".o")
        for source in sources
    ]
    compile_stale = partial(compile_one, flags=flags, newest_header=newest_header)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(compile_stale, sources, targets))
    if output.exists() and output.stat().st_mtime > max(t.stat().st_mtime for t in targets):
        return
    command = [get_cxx_compiler(), "-shared", *map(str, targets), "-o", str(output)]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, *(SANITIZERS if sanitize else ())], check=True)


def preloaded() -> str:
    """What LD_PRELOAD must hold for a sanitized library, separated by spaces."""
    found = []
    for name in PRELOADED:
        command = [get_cxx_compiler(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found.append(path)
    return " ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", help="the library to make")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    parser.add_argument("--preload", action="store_true", help="only print LD_PRELOAD's value")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.preload:
        print(preloaded())
    elif arguments.output is None:
        parser.error("name the library to make")
    else:
        build(arguments.output, arguments.sanitize, arguments.jobs)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {' '.join(error.cmd[:5])} ...")
