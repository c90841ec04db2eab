"""What happens to x before a kernel is the same in C++ and in Python, for every scheme and form."""

import pytest
import torch

import qkernels as qk
from qkernels import compiled, ops, preparation, reference, rounding
from qkernels.layouts import PLAIN, pack
from qkernels.weight import QuantizedWeight
from tests import schemes

needs_extension = pytest.mark.skipif(
    compiled.extension() is None, reason=f"qkernels._C is missing: {compiled.problem()}"
)
N, K = 40, 200
FORMS = {
    "contiguous": lambda x: x,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "part of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def layer_of(text, optional, k=K):
    x = torch.randn(8, k)
    fields = {"perm": torch.randperm(k)} if "perm" in optional else {}
    weight = rounding.quantize(
        torch.randn(N, k),
        text,
        bias=torch.randn(N),
        activation_scale=schemes.activation_scale(text, x),
        **fields,
    )
    if "input_factor" in optional:
        named = {**weight.fields, "input_factor": torch.rand(k) + 0.5}
        weight = QuantizedWeight(
            scheme=weight.scheme, codes=weight.codes, bias=weight.bias, **named
        )
    return qk.WQLinear.from_weight(weight)


def in_python(layer, x):
    """The same kernel with x prepared in Python: flattened, scaled and permuted."""
    buffers = list(layer.packed.buffers.values())
    return ops._linear(x, buffers, layer.bias, layer._spec)


@needs_extension
@pytest.mark.parametrize("text", schemes.ALL)
@pytest.mark.parametrize("optional", [(), ("perm",), ("input_factor",), ("input_factor", "perm")])
def test_as_in_python(text, optional):
    layer = layer_of(text, optional)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for m in (0, 1, 5):
            x = torch.randn(m, K).to(dtype)
            for _ in range(2):  # asked for in Python, then known
                assert torch.equal(layer(x), in_python(layer, x))


@needs_extension
@pytest.mark.parametrize("text", ["w4a16-g64", "w4a16-g24", "w8a8", "fp8-a8", "w3a16"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(K,), (1, K), (6, K), (2, 3, K), (0, K), (2, 0, K)])
def test_any_shape_and_strides(text, form, shape):
    layer = layer_of(text, ())
    x = FORMS[form](torch.randn(shape))
    y = layer(x)
    assert y.shape == (*shape[:-1], N) and y.is_contiguous()
    assert torch.equal(y, layer(x.contiguous()))


@needs_extension
@pytest.mark.parametrize("text", ["fp8-a8", "fp8-a8-tensor", "fp8-a8-static"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float8_is_the_reference_bit_for_bit(text, dtype):
    k = 64
    x = torch.randn(9, k).to(dtype)
    x[0] = 0
    x[1] *= 1e-4
    x[2] *= 300
    scale = torch.tensor(0.3) if "static" in text else None
    # Weights of 448 on the diagonal have a scale of 1, so that y is the quantized x, 448 times.
    weight = rounding.quantize(448 * torch.eye(k), text, activation_scale=scale)
    assert weight.scales.eq(1).all()
    layer = qk.WQLinear.from_weight(weight)
    quantized, scales = reference.quantize_activations(x, pack(weight, PLAIN))
    assert quantized.dtype == torch.float8_e4m3fn
    want = ((448 * quantized.float()) * scales[:, None]).to(dtype)
    assert torch.equal(layer(x), want)


def test_python_applies_the_fields_in_the_order_of_the_table():
    perm, factor = torch.randperm(8), torch.rand(8) + 0.5
    weight = rounding.quantize(torch.randn(4, 8), "w4a16", perm=perm)
    fields = {**weight.fields, "input_factor": factor}
    packed = pack(QuantizedWeight(scheme=weight.scheme, codes=weight.codes, **fields), PLAIN)
    x = torch.randn(2, 3, 8)
    want = (x * factor).flatten(0, 1)[:, perm]
    assert torch.equal(preparation.rows_of(x, packed), want)
