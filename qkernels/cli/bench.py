"""`qkernels bench`: hands its arguments to the benchmark of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def repository() -> Path:
    """The folder that holds bench/ beside this package, in a checkout."""
    return Path(__file__).resolve().parents[2]


def bench(ctx: typer.Context) -> None:
    """Time the kernels and their peers; options are those of `python -m bench` (try --help)."""
    from qkernels.errors import QuantizationError

    root = repository()
    if not (root / "bench" / "__main__.py").is_file():
        raise QuantizationError(
            "the benchmark is not part of the installed package: clone the repository, install it "
            "with pip install -e ., and run qkernels bench again"
        )
    # A process of its own: it chooses its threads and memory settings before torch is imported.
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-m", "bench", *ctx.args], env=environment)
    raise typer.Exit(done.returncode)
