import pytest
import torch
from torch.library import opcheck

from qkernels import WQLinear

TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("text", ["w4a16-g64", "nf4-g64-dq", "w8a8", "w4a8-g64"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(text, requires_grad, device):
    layer = WQLinear.from_linear(torch.nn.Linear(200, 48, device=device), text)
    buffers = [layer._buffers[name] for name in layer._names]
    x = torch.randn(2, 3, 200, device=device, requires_grad=requires_grad)
    ops = torch.ops.qkernels
    opcheck(ops.linear, (x, buffers, layer.bias, layer._spec), test_utils=TESTS)
    opcheck(ops.linear, (x, buffers, None, layer._spec), test_utils=TESTS)
    grad = torch.randn(2, 3, 48, device=device)
    opcheck(ops.linear_grad_input, (grad, buffers, layer._spec), test_utils=TESTS)
    opcheck(ops.dequantize, (buffers, layer._spec), test_utils=TESTS)
    x = x.detach()
    if text in ("w8a8", "w4a8-g64"):
        quantized = (*ops.quantize_per_token(x), buffers, layer.bias, layer._spec, x.dtype)
        opcheck(ops.linear_quantized, quantized, test_utils=TESTS)


def test_opcheck_of_activations(device):
    x, other = torch.randn(2, 3, 200, device=device), torch.randn(2, 3, 200, device=device)
    gain, scale = torch.rand(200, device=device), torch.tensor(0.1, device=device)
    ops = torch.ops.qkernels
    opcheck(ops.quantize_per_token, (x,), test_utils=TESTS)
    opcheck(ops.quantize_per_token_asymmetric, (x,), test_utils=TESTS)
    for given in (None, scale):
        opcheck(ops.quantize_per_tensor, (x, given), test_utils=TESTS)
    for factor in (None, gain):
        opcheck(ops.rms_norm_quantize, (x, factor, 1e-5), test_utils=TESTS)
        opcheck(ops.add_rms_norm_quantize, (x, other, factor, 1e-5), test_utils=TESTS)
    opcheck(ops.silu_mul_quantize, (x, other), test_utils=TESTS)


def test_spec_spells_itself():
    from qkernels.ops import PackedSpec

    layer = WQLinear.from_linear(
        torch.nn.Linear(200, 48), "w4a16-g64", backend="reference", batch_invariant=True
    )
    spec = PackedSpec.of(layer.packed, "reference", True)
    assert PackedSpec.parse(str(spec)) == spec
