"""What torch is set to around a layer changes neither its buffers nor its results."""

import contextlib

import pytest
import torch

import qkernels as qk
from qkernels import layouts, rounding, weight
from tests import schemes, truth
from tests.bounds import FROBENIUS_BOUND

N, K = 40, 200


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def matmul_precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES = {
    "bf16 by default": lambda: default_dtype(torch.bfloat16),
    "fp64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: default_device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": lambda: torch.set_grad_enabled(True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "medium precision": lambda: matmul_precision("medium"),
}


def parts(layer):
    return {**layer.packed.buffers, "bias": layer.bias}


def forget_tables():
    """What is made once is made anew, in the state that is set."""
    for module in (weight, rounding, layouts.padding, layouts.fragment):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture(autouse=True)
def no_state_is_left():
    yield
    forget_tables()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_layers_are_the_same_in_every_state(state, backend):
    for text in (*schemes.ALL, "nf4-g64-dq", "w4a16-g64-dq"):
        linear = torch.nn.Linear(K, N)
        scale = 0.02 if text.endswith(("static", "position")) else None
        wanted = qk.WQLinear.from_linear(linear, text, backend=backend, activation_scale=scale)
        saved = wanted.state_dict()
        inputs = [torch.randn(m, K).to(dtype) for m in (1, 20) for dtype in FROBENIUS_BOUND]
        results = [wanted(x) for x in inputs]
        exacts = [truth.product(wanted.to_weight(), x) for x in inputs]
        dense = wanted.dequantize()
        forget_tables()
        with STATES[state]():
            layer = qk.WQLinear.from_linear(linear, text, backend=backend, activation_scale=scale)
            for name, tensor in parts(wanted).items():
                assert torch.equal(parts(layer)[name], tensor), (text, name)
            other = qk.WQLinear.from_weight(layer.to_weight(), backend=backend)
            other.load_state_dict(saved)
            for each in (layer, other, wanted):
                assert torch.equal(each.dequantize(), dense), text
                for x, result, exact in zip(inputs, results, exacts, strict=True):
                    y = each(x)
                    assert y.device.type == "cpu"
                    if state == "autocast":
                        assert y.dtype == torch.bfloat16
                        continue
                    assert y.dtype == x.dtype
                    assert truth.error(y, exact) <= FROBENIUS_BOUND[x.dtype], (text, x.dtype)
                    assert torch.equal(y, result), text


@pytest.mark.parametrize("state", STATES)
def test_models_are_the_same_in_every_state(state):
    def model():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(K, N), torch.nn.ReLU(), torch.nn.Linear(N, 24))

    wanted, again, x = model(), model(), torch.randn(5, K)
    qk.quantize_model(wanted, scheme="w8a8")
    result = wanted(x)
    with STATES[state]():
        qk.quantize_model(again, scheme="w8a8")
        y = again(x)
        again.load_state_dict(wanted.state_dict())
        if state != "autocast":
            assert torch.equal(y, result) and torch.equal(again(x), result)


@pytest.mark.parametrize("state", STATES)
def test_activations_are_the_same_in_every_state(state):
    x, gain = torch.randn(5, K), torch.rand(K)
    wanted = qk.quantize_activation(x), qk.rms_norm_quantize(x, gain), qk.silu_mul_quantize(x, x)
    with STATES[state]():
        got = qk.quantize_activation(x), qk.rms_norm_quantize(x, gain), qk.silu_mul_quantize(x, x)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.values, other.values) and torch.equal(one.scale, other.scale)
