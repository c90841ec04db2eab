"""An installation without its compiled part says once that it is slow, and how to mend that."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, warnings
if sys.argv[1] == "without":
    sys.modules["qkernels._C"] = None
import torch
import qkernels as qk

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    backend = sys.argv[2] or None
    for text in ("w4a16-g32", "w8a8"):
        for _ in range(2):
            layer = qk.WQLinear.from_linear(torch.nn.Linear(64, 8), text, backend=backend)
            layer(torch.randn(2, 64))
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


def warned(compiled_part, backend="", isa=""):
    environment = {**os.environ, "QKERNELS_CPU_ISA": isa}
    command = [sys.executable, "-c", SCRIPT, compiled_part, backend]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_it_warns_once_with_the_remedy():
    (line,) = warned("without")
    assert line.startswith("UserWarning") and "pip install --no-build-isolation" in line
    assert "qkernels._C" in line  # the reason


@pytest.mark.parametrize("how", [{"backend": "reference"}, {"isa": "portable"}])
def test_who_asked_for_it_is_not_warned(how):
    assert warned("without", **how) == []


def test_nobody_is_warned_where_it_is_there():
    pytest.importorskip("qkernels._C")
    assert warned("with") == []
