"""What code that reads `weight` of a quantized layer gets."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qkernels import WQLinear
from qkernels.errors import LayerError
from qkernels.modules.view import WeightView

N, K = 48, 64


def make(text="w8a16", bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return WQLinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), text)


@pytest.fixture
def calls(monkeypatch):
    """How often a weight's values were made."""
    made = []
    values = WeightView.values
    monkeypatch.setattr(WeightView, "values", lambda view: made.append(1) or values(view))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_described_as_the_weight_that_the_layer_stands_for(dtype, calls):
    layer = make(dtype=dtype)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and isinstance(layer, nn.Linear)
    assert weight.shape == (N, K) and weight.size(0) == N and weight.ndim == weight.dim() == 2
    assert weight.dtype == dtype and weight.device.type == "cpu" and not weight.is_cuda
    assert weight.numel() == N * K and weight.element_size() == dtype.itemsize
    assert len(weight) == N and weight.is_floating_point() and not weight.requires_grad
    assert weight.data.shape == (N, K) and weight.detach().T.shape == (K, N)
    assert weight.to(torch.float64).dtype == torch.float64 and weight.float().dtype == torch.float32
    assert hasattr(weight, "quant_state") is False
    assert not calls
    assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers())


def test_casting_and_moving_the_layer_is_seen():
    layer = make()
    assert layer.half().weight.dtype == torch.float16
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.to("meta").weight.device.type == "meta"


PRODUCTS = {
    "F.linear": lambda x, w: F.linear(x, w),
    "x @ W.T": lambda x, w: x @ w.T,
    "x.matmul(W.t())": lambda x, w: x.matmul(w.t()),
    "torch.mm": lambda x, w: torch.mm(x, w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(torch.zeros(N), x, w.mT),
    "W @ x.T": lambda x, w: (w @ x.T).T,
    "torch.matmul(W, x.T)": lambda x, w: torch.matmul(w, x.transpose(0, 1)).transpose(0, 1),
    "W.to(type)": lambda x, w: F.linear(x, w.to(x.dtype)),
    "W.data": lambda x, w: F.linear(x, w.data.contiguous()),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("text", ["w8a16", "nf4-g32", "w8a8"])
def test_products_run_on_the_kernels(name, text, calls):
    layer, x = make(text, bias=False), torch.randn(5, K)
    assert torch.equal(PRODUCTS[name](x, layer.weight), layer(x))
    assert not calls


def test_a_bias_is_the_callers():
    layer, x, bias = make(bias=True), torch.randn(5, K), torch.randn(N)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
    without = F.linear(x, layer.weight)
    assert torch.allclose(without + layer.bias, layer(x), atol=1e-5)
    assert torch.allclose(F.linear(x, layer.weight, bias), without + bias, atol=1e-5)
    assert torch.equal(layer.weight @ x[0], F.linear(x[0], layer.weight))


def test_a_product_has_the_gradient_of_a_bias():
    layer, x, bias = make(), torch.randn(5, K), torch.zeros(N, requires_grad=True)
    for product in (F.linear(x, layer.weight, bias), torch.addmm(bias, x, layer.weight.t())):
        (grad,) = torch.autograd.grad(product.sum(), bias)
        assert torch.equal(grad, torch.full((N,), 5.0))


def test_a_product_has_the_gradient_of_x():
    layer, x = make(), torch.randn(5, K, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(5, K), atol=1e-4)


VALUES = {
    "norm": lambda w: w.norm(),
    "index": lambda w: w[3, :7],
    "rows": lambda w: w[:4],
    "sum": lambda w: torch.sum(w, dim=1),
    "times": lambda w: 2 * w,
    "cat": lambda w: torch.cat([w, w]),
    "a product of the other side": lambda w: torch.ones(3, N) @ w,
    "view": lambda w: w.view(4, -1),
    "chunk": lambda w: w.chunk(2)[1],
    "list": lambda w: torch.tensor(w.tolist()),
    "iterate": lambda w: torch.stack([row.clone() for row in w]),
    "clone": lambda w: w.clone(),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "einsum": lambda w: torch.einsum("nk,nk->n", w, w),
    "as an input to C++": lambda w: torch.ops.aten.mul.Tensor(w, w),
}


@pytest.mark.parametrize("name", VALUES)
def test_other_uses_get_values(name):
    layer = make()
    got, want = VALUES[name](layer.weight), VALUES[name](layer.dequantize())
    assert type(got) is torch.Tensor and torch.equal(got, want)


def test_values_have_the_type_of_the_layer():
    layer = make(dtype=torch.bfloat16)
    assert torch.equal(layer.weight.clone(), layer.dequantize().bfloat16())
    assert torch.equal(layer.weight.T.clone(), layer.dequantize().bfloat16().T)


def test_copies_are_ordinary_tensors():
    layer = make()
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer.weight), torch.load(file, weights_only=True)):
        assert type(copied) is torch.Tensor and torch.equal(copied, layer.dequantize())


WRITES = {
    "copy_": lambda layer, new: layer.weight.copy_(new),
    "data": lambda layer, new: layer.weight.data.normal_(),
    "data.__set__": lambda layer, new: setattr(layer.weight, "data", new),
    "init": lambda layer, new: nn.init.zeros_(layer.weight),
    "init by name": lambda layer, new: nn.init.normal_(tensor=layer.weight),
    "init of a layer": lambda layer, new: nn.init.kaiming_uniform_(layer.weight),
    "data of another layer": lambda layer, new: setattr(layer.weight, "data", make("w8a8").weight),
    "data of another type": lambda layer, new: setattr(
        layer.weight, "data", layer.weight.data.half()
    ),
    "grad": lambda layer, new: setattr(layer.weight, "grad", new),
    "items": lambda layer, new: layer.weight.__setitem__(0, 0.0),
    "add_": lambda layer, new: layer.weight.data.add_(new),
    "augmented": lambda layer, new: layer.weight.data.__iadd__(new),
    "out": lambda layer, new: torch.mul(new, 2, out=layer.weight),
    "parameter": lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
    "reset": lambda layer, new: layer.reset_parameters(),
    "by a number that scales do not take": lambda layer, new: layer.weight.mul_(1 / 3),
    "by zero": lambda layer, new: layer.weight.mul_(0),
    "by a tensor": lambda layer, new: layer.weight.mul_(new),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_is_an_error_and_changes_nothing(name):
    layer, x = make(), torch.randn(2, K)
    want = layer(x)
    with pytest.raises(LayerError, match="quantize"):
        WRITES[name](layer, torch.ones(N, K))
    assert torch.equal(layer(x), want)


NOTHING = {
    "requires_grad": lambda layer: setattr(layer.weight, "requires_grad", False),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(False),
    "grad": lambda layer: setattr(layer.weight, "grad", None),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data.contiguous()),
    "data to where it is": lambda layer: setattr(layer.weight, "data", layer.weight.data.to("cpu")),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_writes_nothing_is_let_through(name, calls):
    NOTHING[name](make())
    assert not calls


def test_a_frozen_parameter_of_it_is_the_view():
    layer, other, x = make(), nn.Linear(K, N), torch.randn(2, K)
    other.weight = nn.Parameter(layer.weight, requires_grad=False)
    assert torch.equal(F.linear(x, other.weight, layer.bias), layer(x))
    assert torch.equal(other.state_dict()["weight"].clone(), layer.dequantize())


TRAINING = {
    "requires_grad": lambda weight: setattr(weight, "requires_grad", True),
    "requires_grad_": lambda weight: weight.requires_grad_(),
    "parameter": nn.Parameter,
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_it_is_an_error(name):
    weight = make().weight
    with pytest.raises(LayerError, match="train an adapter"):
        TRAINING[name](weight)


@pytest.mark.parametrize("text", ["w4a16-g32", "nf4-g32-dq", "w4a8-g32", "w8a8", "binary-g32"])
def test_powers_of_two_multiply_the_scales(text):
    layer = make(text, bias=False)
    before = layer.dequantize()
    layer.weight.div_(4)
    assert torch.equal(layer.dequantize(), before / 4)
    layer.weight.data.mul_(4)
    assert torch.equal(layer.dequantize(), before)


class ReadsItsWeight(nn.Module):
    """As T5 does, before it calls the layer; and as Mamba does, instead of that."""

    def __init__(self, layer, product):
        super().__init__()
        self.layer, self.product = layer, product

    def forward(self, x):
        x = x.to(self.layer.weight.dtype) if self.layer.weight.device == x.device else x
        if self.product:
            return F.linear(x, self.layer.weight, self.layer.bias)
        return self.layer(x)


@pytest.mark.parametrize("product", [False, True])
def test_reading_it_does_not_break_a_compiled_graph(product):
    module, x = ReadsItsWeight(make(), product), torch.randn(5, K)
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(graph(x), module(x), atol=1e-5)


def test_fused_functions_of_torch_get_values():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(K, 4, 96, batch_first=True, dropout=0).eval()
    attention, x = nn.MultiheadAttention(K, 4, batch_first=True).eval(), torch.randn(2, 7, K)
    with torch.no_grad():
        for module, call in ((encoder, encoder), (attention, lambda x: attention(x, x, x)[0])):
            want = call(x)
            for name, layer in list(module.named_modules()):
                if isinstance(layer, nn.Linear):
                    module.set_submodule(name, WQLinear.from_linear(layer, "w8a16"))
            assert (call(x) - want).norm() / want.norm() < 0.02
