"""Memory that is not there, for the scratch of threads too, is an error and never the end."""

import subprocess
import sys

import pytest

from qkernels import compiled

resource = pytest.importorskip("resource")

SCRIPT = """
import os, resource, sys
import torch
import qkernels as qk

torch.set_num_threads(3)
# More rows than those a kernel is checked with when a layer is made, whose scratch stays.
N, K, M = 16, 1 << 20, 64
scheme = sys.argv[1]
scale = 0.02 if scheme.endswith(("static", "position")) else None
layer = qk.WQLinear.from_linear(torch.nn.Linear(K, N), scheme, activation_scale=scale)
x = torch.randn(M, K).bfloat16()
torch.randn(10**6).exp()  # starts the threads: their runtime ends the process where it cannot
calls = {"layer": lambda: layer(x), "rows": lambda: qk.quantize_activation(x).values}
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
failures = 0
results = {}
for name, call in calls.items():
    for step in range(400):
        resource.setrlimit(resource.RLIMIT_AS, (used + (step << 20), resource.RLIM_INFINITY))
        try:
            results[name] = call()
            break
        except (MemoryError, RuntimeError) as error:
            assert "memory" in str(error) or type(error) is MemoryError, repr(error)
            failures += 1
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for name, call in calls.items():
    assert torch.equal(results[name], call())
print(failures)
"""


@pytest.mark.skipif(compiled.extension() is None, reason="needs the compiled part")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("text", ["w8a8", "w8a8-static", "w4a16-g128", "w4a8-g64"])
def test_too_little_memory_is_an_error(text):
    done = subprocess.run([sys.executable, "-c", SCRIPT, text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 0
