"""Builds qkernels._C and installs triton_kernels/ as qkernels.triton_kernels.

_C is built against the torch that is importable while building, so build with
`pip install --no-build-isolation .`. Where the tools to build it are missing, the package is
pure Python, the build says why, and so does the ImportError of `qkernels._C` afterwards. An error
in the sources is never hidden: it fails the build. All metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Every architecture a kernel is written for; 9.0a because wgmma exists only there.
CUDA_ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0"
PROBE = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>().size()); }\n"


def compiles(compiler: list[str], *flags: str) -> bool:
    """Whether `compiler` makes a C++17 program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        command = [*compiler, "-std=c++17", *flags, str(source), "-o", str(Path(folder, "probe"))]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def reason_not_to_build() -> str | None:
    """Which tool for building qkernels._C is missing here; None if all are there."""
    try:
        from torch.utils.cpp_extension import get_cxx_compiler
    except ModuleNotFoundError as error:
        return (
            f"the environment it was built in has no {error.name}; "
            "install torch, then: pip install --no-build-isolation ."
        )
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        return f"Python.h is not in {include}; install Python's development headers"
    compiler = get_cxx_compiler()
    if not compiles(shlex.split(compiler)):
        return (
            f"{compiler!r} does not compile a C++17 program; "
            "install a C++ compiler or name it in CXX"
        )
    return None


def cuda_architectures(nvcc: Path) -> str:
    """The architectures to compile for: the user's TORCH_CUDA_ARCH_LIST, else what nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {name.removeprefix("compute_") for name in listed.stdout.split()}
    ours = [a for a in CUDA_ARCHITECTURES.split() if a.replace(".", "").rstrip("a") in known]
    return os.environ.setdefault("TORCH_CUDA_ARCH_LIST", " ".join(ours))


def extension() -> tuple[Extension, type]:
    """qkernels._C and the command that builds it."""
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
    )

    def sources(pattern: str) -> list[str]:
        return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))

    cpp = [
        *sources("csrc/cpu/*.cpp"),
        *sources("csrc/bindings/*.cpp"),
        *sources("csrc/bindings/cpu/*.cpp"),
        # Schedules, which are functions of numbers.
        *sources("csrc/cuda/**/*.cpp"),
    ]
    cuda = [
        *sources("csrc/cuda/**/*.cu"),
        *sources("csrc/bindings/cuda/*.cpp"),
    ]
    headers = sources("csrc/**/*.h") + sources("csrc/**/*.cuh")
    openmp = ["-fopenmp"] if compiles(shlex.split(get_cxx_compiler()), "-fopenmp") else []
    # OpenMP is not linked: torch brings a runtime, and a second one would start threads of its own,
    # which spin on the cores that torch's need.
    options: dict[str, Any] = {"include_dirs": [str(ROOT / "csrc")], "depends": headers}
    # A product and a sum must not be contracted where the reference rounds in between.
    cxx_flags = ["-O3", "-g0", "-Wall", "-ffp-contract=off", "-fvisibility=hidden", *openmp]
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if cuda and torch.version.cuda and nvcc.exists():
        cxx_flags.append(f'-DQKERNELS_CUDA_ARCHITECTURES="{cuda_architectures(nvcc)}"')
        options["extra_compile_args"] = {"cxx": cxx_flags, "nvcc": ["-O3", "-lineinfo"]}
        instantiate = runpy.run_path(str(ROOT / "csrc" / "cuda" / "instantiate.py"))
        cuda += [path.relative_to(ROOT).as_posix() for path in instantiate["write"]()]
        module = CUDAExtension("qkernels._C", cpp + cuda, **options)
    else:
        options["extra_compile_args"] = {"cxx": cxx_flags}
        module = CppExtension("qkernels._C", cpp, **options)

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            version = self.distribution.get_version()
            module.define_macros.append(("QKERNELS_VERSION", f'"{version}"'))
            super().build_extensions()

    return module, Build


NOT_BUILT = reason_not_to_build()


class BuildPython(build_py):
    """Copies the modules and, where _C is not built, leaves the reason in its place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        stand_in = Path(self.build_lib, "qkernels", "_C.py")
        if NOT_BUILT is None:
            stand_in.unlink(missing_ok=True)
        else:
            message = f"qkernels._C was not built: {NOT_BUILT}"
            stand_in.write_text(f"raise ImportError({message!r})\n")


commands: dict[str, type] = {"build_py": BuildPython}
modules: list[Extension] = []
if NOT_BUILT is None:
    module, commands["build_ext"] = extension()
    modules.append(module)
else:
    print(f"qkernels: pure-Python package, without qkernels._C: {NOT_BUILT}", file=sys.stderr)

FOLDERS = {"qkernels": "qkernels", "qkernels.triton_kernels": "triton_kernels"}
setup(
    packages=[
        *FOLDERS,
        *(f"{name}.{child}" for name, path in FOLDERS.items() for child in find_packages(path)),
    ],
    py_modules=["qkernels_bitsandbytes"],
    package_dir=FOLDERS,
    package_data={
        "qkernels": ["py.typed", "*.pyi"],
        "qkernels.models": ["data/*"],
        "qkernels.triton_kernels": ["tuned/*.json"],
    },
    ext_modules=modules,
    cmdclass=commands,
)
