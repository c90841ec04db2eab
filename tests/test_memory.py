"""Packing works on slices: a large weight needs little more than its packed self."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory import EXACT

SCRIPT = """
import resource, sys, torch
from qkernels import WQLinear
n, k = 28672 // 4, 8192
weight = torch.empty(n, k, dtype=torch.bfloat16).normal_()
linear = torch.nn.Linear(1, 1, bias=False)
linear.weight = torch.nn.Parameter(weight, requires_grad=False)
linear.in_features, linear.out_features = k, n
WQLinear.from_linear(torch.nn.Linear(256, 256), "w4a16-g128", backend=sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
layer = WQLinear.from_linear(linear, "w4a16-g128", backend=sys.argv[1])
print((peak() - before) / weight.nbytes)
"""

FREED = """
from pathlib import Path
import torch
from qkernels.checkpoints.memory import give_back_free_pages
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))
give_back_free_pages()
before = held()
blocks = [torch.ones(1 << 14) for _ in range(1024)]  # of 64 KB, which come from a heap
pins = blocks[-1:]
del blocks
kept = held()
give_back_free_pages()
print((kept - before) >> 20, (held() - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_free_pages_go_back_from_below_what_is_held():
    command = [sys.executable, "-c", FREED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    if kept < 32:
        pytest.skip("this C library keeps nothing that could be given back")
    assert left <= 16


def test_packing_a_large_weight_is_bounded():
    for backend in ("reference", "interpreted"):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, backend],
            capture_output=True,
            text=True,
            check=True,
            env={**EXACT, "TRITON_INTERPRET": "1"},
        )
        # The packed weight alone is 0.27 of the 16-bit one.
        assert float(result.stdout) <= 1.25, backend
