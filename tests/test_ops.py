"""The operators as torch sees them: schemas, shapes, gradients, autocast, compilation, errors."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from qkernels import (
    QuantizedActivation,
    QuantizedWeight,
    WQLinear,
    compiled,
    linear,
    quantize_activation,
)
from qkernels.errors import WeightError

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
    buffers = list(layer.packed.buffers.values())
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
    scale, zero = torch.tensor(0.1, device=device), torch.tensor(5, device=device).int()
    for reader in ((scale, None, False), (scale, zero, True)):
        given = (x, None, buffers, layer.bias, layer._spec, None, *reader)
        opcheck(ops.linear_to_int8, given, test_utils=TESTS)
        if text in ("w8a8", "w4a8-g64"):
            given = (*quantized, *reader)
            opcheck(ops.linear_to_int8, given, test_utils=TESTS)


def test_opcheck_of_activations(device):
    x, other = torch.randn(2, 3, 200, device=device), torch.randn(2, 3, 200, device=device)
    gain, scale = torch.rand(200, device=device), torch.tensor(0.1, device=device)
    ops = torch.ops.qkernels
    opcheck(ops.quantize_per_token, (x,), test_utils=TESTS)
    opcheck(ops.quantize_per_token_float8, (x,), test_utils=TESTS)
    opcheck(ops.quantize_per_token_asymmetric, (x,), test_utils=TESTS)
    for given in (None, scale):
        opcheck(ops.quantize_per_tensor, (x, given), test_utils=TESTS)
        opcheck(ops.quantize_per_tensor_float8, (x, given), test_utils=TESTS)
    for factor in (None, gain):
        for rounded in ("", "_rounded"):
            for name, arguments in (
                ("rms_norm_quantize", (x, factor, 1e-5)),
                ("add_rms_norm_quantize", (x, other, factor, 1e-5)),
                ("layer_norm_quantize", (x, factor, factor, 1e-5)),
                ("silu_mul_quantize", (x, other)),
                ("gelu_mul_quantize", (x, other, "tanh")),
            ):
                opcheck(getattr(ops, name + rounded), arguments, test_utils=TESTS)


def test_spec_spells_itself():
    from qkernels.ops import PackedSpec

    layer = WQLinear.from_linear(
        torch.nn.Linear(200, 48), "w4a16-g64", backend="reference", batch_invariant=True
    )
    spec = PackedSpec.of(layer.packed, "reference", True)
    assert PackedSpec.parse(str(spec)) == spec


def layer_of(text, device, **kwargs):
    return WQLinear.from_linear(torch.nn.Linear(200, 48, device=device), text, **kwargs)


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8"])
def test_a_gradient_only_where_x_wants_one(text, device):
    layer, x = layer_of(text, device), torch.randn(3, 200, device=device)
    assert layer(x).grad_fn is None
    x.requires_grad_()
    y = layer(x)
    assert y.requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    assert torch.allclose(got, grad @ layer.dequantize(), atol=1e-4)


def test_weights_that_were_made_in_inference_mode_pass_gradients(device):
    with torch.inference_mode():
        layer = layer_of("w4a16-g64", device)
    x = torch.randn(3, 200, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.skipif(
    compiled.extension() is None, reason="torch's autograd of operators in Python does not tell"
)
def test_forward_mode_is_refused(device):
    layer, x = layer_of("w4a16-g64", device), torch.randn(3, 200, device=device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward"):
        layer(forward_ad.make_dual(x, x))


def test_backward_is_compiled_with_the_rest(device):
    layer, x = layer_of("w4a16-g64", device), torch.randn(3, 200, device=device)

    def compiler(graph):
        return torch.compile(graph, backend="aot_eager", fullgraph=True)

    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    got = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(compiler):
        layer(got).sum().backward()
    assert torch.equal(got.grad, wanted.grad)


def test_gradients_of_a_compiled_layer(device):
    layer, x = layer_of("nf4-g64", device), torch.randn(3, 200, device=device)
    both = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        again = x.clone().requires_grad_()
        run(again).square().sum().backward()
        both.append(again.grad)
    assert torch.equal(*both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_autocast_casts_x(dtype, device):
    layer, x = layer_of("w4a16-g64", device), torch.randn(3, 200, device=device).to(dtype)
    want = layer(x.bfloat16())
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(layer(x), want)
        assert torch.equal(linear(x, layer.packed, layer.bias), want)
        whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(whole(x), want)
        with torch.autocast(device.type, enabled=False):
            assert layer(x.float()).dtype == torch.float32
        again = x.clone().requires_grad_()
        layer(again).sum().backward()
        assert again.grad.dtype == dtype
        with pytest.raises(WeightError, match="int32"):
            layer(x.int())


def test_as_a_function_of_its_buffers(device):
    layer, other = layer_of("w4a16-g64", device), layer_of("w4a16-g64", device)
    x = torch.randn(3, 200, device=device)
    y = torch.func.functional_call(layer, dict(other.named_buffers()), (x,))
    assert torch.equal(y, other(x))


def test_x_that_is_quantized_is_refused_where_it_cannot_be_used(device):
    quantized = quantize_activation(torch.randn(3, 200, device=device))
    for text in ("w4a16-g64", "w8a8-tensor"):
        layer = layer_of(text, device)
        for _ in range(2):  # before and after the layer has run
            with pytest.raises(WeightError, match=f"layers of {text} do not take"):
                layer(quantized)
            layer(torch.randn(3, 200, device=device))
    plain = layer_of("w8a8", device).to_weight()
    fields = {**plain.fields, "input_factor": torch.rand(200, device=device) + 0.5}
    weight = QuantizedWeight(scheme=plain.scheme, codes=plain.codes, **fields)
    layer = WQLinear.from_weight(weight)
    for _ in range(2):
        with pytest.raises(WeightError, match="input_factor comes before that"):
            layer(quantized)
        layer(torch.randn(3, 200, device=device))
    layer = layer_of("w8a8", device)
    wrong_scale = QuantizedActivation(quantized.values, quantized.scale[:2], quantized.dtype)
    floats = QuantizedActivation(quantized.values.float(), quantized.scale, quantized.dtype)
    narrow = QuantizedActivation(quantized.values[:, :9], quantized.scale, quantized.dtype)
    for _ in range(2):
        for wrong, message in (
            (wrong_scale, r"scale of x must be float32 \[3, 1\]"),
            (floats, "must be int8"),
            (narrow, r"must be int8 \[..., 200\]"),
        ):
            with pytest.raises(WeightError, match=message):
                layer(wrong)
        layer(quantized)
