"""A forked child of a process that used torch's threads works, with threads of its own."""

import os
import signal
import time
import traceback

import pytest
import torch

import qkernels as qk
from qkernels import compiled
from tests import schemes

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.skipif(compiled.extension() is None, reason="needs the compiled part"),
]

SECONDS = 120
"""After which a child hangs; one that does not takes well under a second."""
N, K = 600, 1024  # enough work for threads


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    torch.randn(10**6).exp().sum()
    yield
    torch.set_num_threads(before)


def in_child(work):
    """Runs `work`, which returns whether all is right, in a forked child."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.parametrize("text", [*schemes.ALL, "nf4-g64-dq"])
def test_layers_work_in_a_child(text):
    linear = torch.nn.Linear(K, N)
    scale = 0.02 if text.endswith(("static", "position")) else None
    layer = qk.WQLinear.from_linear(linear, text, activation_scale=scale)
    one, many = torch.randn(1, K), torch.randn(70, K)
    wanted = layer(one), layer(many), layer.dequantize()

    def work():
        made = qk.WQLinear.from_linear(linear, text, activation_scale=scale)
        got = layer(one), layer(many), layer.dequantize()
        same = all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        return same and torch.equal(made(many), wanted[1]) and torch.get_num_threads() == 3

    in_child(work)
    assert torch.equal(layer(many), wanted[1])  # the parent's threads are back


def test_activations_are_quantized_in_a_child():
    x = torch.randn(300, K)
    wanted = qk.quantize_activation(x), qk.rms_norm_quantize(x, None), qk.silu_mul_quantize(x, x)

    def work():
        got = qk.quantize_activation(x), qk.rms_norm_quantize(x, None), qk.silu_mul_quantize(x, x)
        return all(torch.equal(a.values, b.values) for a, b in zip(got, wanted, strict=True))

    in_child(work)


def test_grandchildren_and_torch_itself_work():
    x = torch.randn(1000, 1000)
    wanted = x @ x

    def work():
        same = torch.equal(x @ x, wanted)
        in_child(lambda: torch.equal(x @ x, wanted))
        return same and torch.equal(x @ x, wanted)

    for _ in range(3):
        in_child(work)
