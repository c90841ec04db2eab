"""Packing works on slices: a large weight needs little more than its packed self."""

import os
import subprocess
import sys

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


def test_packing_a_large_weight_is_bounded():
    for backend in ("reference", "interpreted"):
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, backend],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        # The packed weight alone is 0.27 of the 16-bit one.
        assert float(result.stdout) <= 1.25, backend
