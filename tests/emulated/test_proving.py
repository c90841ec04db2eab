"""A CUDA kernel that is wrong on a machine is caught, warned of once, and passed over.

The emulator stands for the GPU: its kernels are put first, and trusted no more than those of a GPU.
"""

import warnings
from dataclasses import replace

import pytest
import torch

import qkernels as qk
from qkernels import proving, rounding, select
from qkernels.backends import cuda
from tests.bounds import FROBENIUS_BOUND
from tests.emulated.emulator import (
    disabled,
    failing_launches,
    gradient,
    needs_emulator,
    product,
    sites,
)

pytestmark = needs_emulator

N, K = 40, 256
MMA, DENSE = "emulated_weight_only_mma", "emulated_dequantize_matmul"
FLOAT = "emulated_weight_only_mma_float"


@pytest.fixture(autouse=True)
def first():
    """The emulated kernels before all others, still to be checked."""
    before = list(select.KERNELS)
    rows = [replace(row, proves_itself=True) for row in cuda.EMULATED_KERNELS]
    select.KERNELS[:] = [*rows, *(row for row in before if row not in cuda.EMULATED_KERNELS)]
    proving.forget_proofs()
    yield
    select.KERNELS[:] = before
    proving.forget_proofs()


def weight(text="w4a16-g64"):
    return rounding.quantize(torch.randn(N, K), text, bias=torch.randn(N))


def chosen(text="w4a16-g64", m=3):
    rows = qk.explain(text, n=N, k=K, m=m, x_dtype=torch.float16)
    return next(row.kernel for row in rows if row.chosen)


def is_right(layer, dtype=torch.float16):
    x = torch.randn(5, K, dtype=dtype)
    reference = qk.WQLinear.from_weight(layer.to_weight(), backend="reference")
    y, want = layer(x).double(), reference(x).double()
    return float((y - want).norm() / want.norm()) <= 2 * FROBENIUS_BOUND[dtype]


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a16-g64-sym", "nf4-g64", "fp8e4m3-a16"])
def test_kernels_that_are_right_are_trusted_without_a_word(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = qk.WQLinear.from_weight(weight(text))
    assert chosen(text) == MMA and layer.packed.layout.name == "fragment"
    assert is_right(layer)


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("w8a8", "emulated_int8_mma"),
        ("w4a8-g64-static", "emulated_int8_mma"),
        ("w8a8-staticasym", "emulated_int8_mma"),
        ("w4a8-g64-flat", "emulated_int8_mma_grouped"),
        ("w8a8-position", "emulated_int8_positions"),
        ("w4a4-g64", "emulated_int4_activations"),
    ],
)
def test_integer_kernels_are_trusted_too(text, kernel):
    scheme = qk.QuantScheme.parse(text)
    scale = 0.05 if scheme.activation.is_static else None
    quantized = rounding.quantize(
        torch.randn(N, K), text.replace("staticasym", "static"), activation_scale=scale
    )
    if scheme.activation.has_zeros:
        zero = torch.tensor(3, dtype=torch.int32)
        quantized = quantized.replace(scheme=scheme, activation_zero=zero)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = qk.WQLinear.from_weight(quantized)
    assert chosen(text) == kernel and layer.packed.layout.name == "fragment_int8"
    assert is_right(layer)


def test_an_integer_kernel_whose_launches_fail_leaves_the_layer_to_another_backend():
    with (
        failing_launches("no kernel image is available"),
        pytest.warns(RuntimeWarning, match="emulated_int8_mma fails"),
    ):
        layer = qk.WQLinear.from_weight(weight("w8a8"))
    assert chosen("w8a8").startswith("cpu_") and layer.packed.layout.name == "vnni"
    assert is_right(layer)


def test_a_kernel_without_one_of_its_waits_is_caught_and_passed_over():
    packed = qk.WQLinear.from_weight(weight(), check_kernels=False).packed
    with sites() as found:
        product(torch.randn(3, K, dtype=torch.float16), packed)
    # The last one in the source is for the stage that is read next; that before it ends a block.
    waits = (site for site in found["copy_async_wait"] if site["file"].endswith("walk.cuh"))
    place = max(waits, key=lambda site: site["line"])
    quantized = weight()
    with disabled("copy_async_wait", place["file"], place["line"]):
        with pytest.warns(RuntimeWarning, match=f"the kernel {MMA} ") as caught:
            layer = qk.WQLinear.from_weight(quantized)
        assert len(caught) == 1
        # The next one in order reads the same layout; it has no such wait, and is right.
        assert chosen() == DENSE and layer.packed.layout.name == "fragment"
        assert is_right(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qk.WQLinear.from_weight(quantized)
    reason = next(row.reason for row in qk.explain("w4a16-g64", n=N, k=K) if row.kernel == MMA)
    assert "failed its check on this machine" in reason


def test_a_kernel_whose_gradient_is_wrong_is_passed_over():
    packed = qk.WQLinear.from_weight(weight(), check_kernels=False).packed
    with sites() as found:
        gradient(torch.randn(3, N, dtype=torch.float16), packed)
    (place,) = found["movmatrix"]
    with disabled("movmatrix", place["file"], place["line"]):
        with pytest.warns(RuntimeWarning, match=f"{MMA} is off in the gradient of x by") as caught:
            layer = qk.WQLinear.from_weight(weight())
        assert len(caught) == 1 and chosen() == DENSE
        x = torch.randn(5, K, dtype=torch.float16, requires_grad=True)
        y = layer(x)
        y.backward(torch.ones_like(y))
    want = layer.dequantize().double().sum(0).expand(5, -1)
    assert float((x.grad.double() - want).norm() / want.norm()) <= FROBENIUS_BOUND[torch.float16]


def test_launches_that_fail_leave_the_layer_to_another_backend():
    with (
        failing_launches("no kernel image is available for execution on the device"),
        pytest.warns(RuntimeWarning) as caught,
    ):
        layer = qk.WQLinear.from_weight(weight())
    said = [str(warning.message) for warning in caught]
    assert all("no kernel image is available" in text for text in said)
    # A name may begin another.
    failed = [text.split(" fails ")[0].removeprefix("the kernel ") for text in said]
    assert sorted(failed) == sorted((MMA, DENSE, FLOAT))
    # Nothing is left that reads their layout but the reference: the weight goes to another one.
    assert chosen().startswith("cpu_") and layer.packed.layout.name == "vnni"
    assert is_right(layer, torch.float32)
