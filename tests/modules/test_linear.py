import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qkernels as qk
from qkernels import WQLinear
from qkernels.errors import LayerError, QuantizationError, WeightError
from qkernels.layouts import LAYOUTS
from qkernels.select import layout_for
from tests import schemes

SOME = (
    "w4a16-g64",
    "w3a16-g24",
    "nf4-g64-dq",
    "w8a8",
    "w4a8-g64",
    "fp8-a8-static",
    "w4a16-gtensor",
)


def linear(k=200, n=48, **kwargs):
    return nn.Linear(k, n, **kwargs)


def quantized(text, source=None, **kwargs):
    activation = qk.QuantScheme.parse(text).activation
    scale = (0.5 if activation.bits == 4 else 0.05) if activation.is_static else None
    return WQLinear.from_linear(source or linear(), text, activation_scale=scale, **kwargs)


@pytest.mark.parametrize("text", schemes.ALL)
def test_close_to_the_layer_it_replaces(text):
    source, x = linear(), torch.randn(2, 3, 200)
    y = quantized(text, source)(x)
    assert y.shape == (2, 3, 48) and y.dtype == x.dtype
    # Two bits leave about a third of error; nothing may be worse than that.
    by_name = {"binary": 0.8, "log3": 0.35, "log4": 0.25}
    scheme = qk.QuantScheme.parse(text)
    weight = scheme.weight
    worst = by_name.get(weight.name) or {2: 0.6, 3: 0.25}.get(weight.bits, 0.15)
    worst += 0.15 if scheme.activation.bits == 4 else 0
    assert (y - source(x)).norm() / source(x).norm() < worst


@pytest.mark.parametrize("text", schemes.ALL)
def test_from_linear_and_from_weight_agree_exactly(text):
    layer, x = quantized(text), torch.randn(3, 200)
    again = WQLinear.from_weight(layer.to_weight())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(again.dequantize(), layer.dequantize())
    assert torch.equal(layer.to_weight().dequantize(), layer.dequantize())


@pytest.mark.parametrize("text", SOME)
@pytest.mark.parametrize("backend", ["reference", "interpreted"])
def test_state_dict_deepcopy_and_pickle(text, backend, tmp_path):
    if torch.cuda.is_available() and backend == "interpreted":
        pytest.skip("the interpreter is off where there is a GPU")
    layer, x = quantized(text, backend=backend), torch.randn(2, 200)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), want)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    # A state dict does not depend on the layout of the layer that wrote it.
    for other in ("reference", backend):
        target = quantized(text, backend=other)
        target.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        assert torch.equal(target.dequantize(), layer.dequantize())
        assert other != backend or torch.equal(target(x), want)


def test_a_wrong_state_dict_changes_nothing():
    layer, x = quantized("w4a16-g64"), torch.randn(2, 200)
    want, state = layer(x), layer.state_dict()
    words = next(name for name in state if name.startswith("words"))
    for change, message in (
        ({words: state[words][:, :3]}, f"{words}: expected"),
        ({words: None, "words": None}, f"Missing key.*{words}"),
        ({"scales": state["scales"].float()}, "scales: expected torch.float16"),
        ({"scales": state["scales"] * float("nan")}, "NaN or infinity"),
        ({"zeros": None}, "Missing key.*zeros"),
        ({"extra": torch.ones(1)}, "Unexpected key.*extra"),
    ):
        wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(wrong)
        if "extra" not in change:
            assert torch.equal(layer(x), want)


def test_casting_keeps_scales_and_moving_to_meta_and_back():
    layer, x = quantized("w4a16-g64-sfp32"), torch.randn(2, 200)
    weight, state = layer.dequantize(), layer.state_dict()
    for cast in (layer.half, layer.bfloat16, lambda: layer.to(torch.float64), layer.float):
        cast()
        assert layer.scales.dtype == torch.float32
        assert torch.equal(layer.dequantize(), weight)
    assert layer(x.half()).dtype == torch.float16
    empty = layer.to("meta")
    assert all(buffer.device.type == "meta" for buffer in empty.buffers())
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(layer.dequantize(), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="moves between two types of devices")
@pytest.mark.parametrize("text", SOME)
def test_moving_repacks(text):
    layer, x = quantized(text), torch.randn(2, 200)
    weight, y = layer.dequantize(), layer(x)
    layer.cuda()
    assert layer._layout == layout_for(layer.scheme, 48, 200, "cuda").name != "plain"
    assert torch.equal(layer.dequantize().cpu(), weight)
    assert torch.allclose(layer(x.cuda()).cpu(), y, rtol=1e-2, atol=1e-2)
    assert torch.equal(layer.cpu()(x), y)


def test_moving_between_layouts_is_exact(monkeypatch):
    """What `.to(device)` does, between the layouts of two backends on one device."""
    from qkernels.modules.packed import moved

    for text in SOME:
        plain = quantized(text, backend="reference").packed
        planar = moved(plain, LAYOUTS["planar"], plain.device)
        back = moved(planar, LAYOUTS["plain"], plain.device)
        assert list(plain.buffers) == list(back.buffers)
        for name, buffer in plain.buffers.items():
            assert torch.equal(buffer, back.buffers[name]), (text, name)


@pytest.mark.parametrize("text", ["w4a16-g64", "w8a8", "nf4-g64"])
def test_gradient_reaches_x_but_no_weight(text):
    layer = quantized(text)
    x = torch.randn(2, 3, 200, requires_grad=True)
    grad = torch.randn(2, 3, 48)
    layer(x).backward(grad)
    assert torch.allclose(x.grad, grad @ layer.dequantize(), atol=1e-4)
    assert not list(layer.parameters())


def test_autocast_and_non_contiguous_and_empty_input():
    layer = quantized("w4a16-g64")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 200)).dtype == torch.bfloat16
    x = torch.randn(200, 6).t()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert layer(torch.randn(0, 200)).shape == (0, 48)
    assert layer(torch.randn(2, 0, 200)).shape == (2, 0, 48)
    assert layer(torch.randn(200)).shape == (48,)


def test_compiles_whole():
    layer, x = quantized("w4a16-g64"), torch.randn(3, 200)
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), torch.relu(layer(x)))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 40, 300):
        compiled(torch.randn(m, 200))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: (nn.Conv2d(1, 1, 1), "w4a16"), LayerError, "Conv2d"),
        (lambda: (quantized("w4a16"), "w4a16"), LayerError, "quantized already"),
        (lambda: (linear().double(), "w4a16"), WeightError, "float64"),
        (lambda: (linear(device="meta"), "w4a16"), WeightError, "meta"),
        (lambda: (linear(k=0), "w4a16"), WeightError, r"\[48, 0\]"),
        (lambda: (nn.LazyLinear(48), "w4a16"), LayerError, "run it once"),
        (lambda: (linear(), "w8a8-static"), WeightError, "calibration"),
        (lambda: (linear(), "w4a16-g0"), QuantizationError, "group size 0"),
    ],
)
def test_wrong_layers_are_named(make, error, named):
    layer, text = make()
    with pytest.raises(error, match=named):
        WQLinear.from_linear(layer, text, name="model.up_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_located(bad):
    source = linear()
    source.weight.data[3, 7] = bad
    with pytest.raises(WeightError, match=rf"up_proj.*\[3, 7\] is {bad}"):
        WQLinear.from_linear(source, "w4a16-g64", name="up_proj")


def test_scales_that_overflow_name_the_remedy():
    source = linear()
    source.weight.data *= 1e8
    with pytest.raises(WeightError, match="w4a16-g64-sfp32"):
        WQLinear.from_linear(source, "w4a16-g64")
    layer = WQLinear.from_linear(source, "w4a16-g64-sfp32")
    assert (layer.dequantize() - source.weight).norm() / source.weight.norm() < 0.1


def test_repr_and_explain():
    assert "scheme=w4a16-g64" in repr(quantized("w4a16-g64"))
    rows = qk.explain("w4a16-g64", n=48, k=200, m=1)
    assert sum(row.chosen for row in rows) == 1
    assert all(row.chosen or row.reason or "could run" in str(row) for row in rows)
    wanted = "reference" if qk.compiled.extension() is None else "cpu"
    assert next(row for row in rows if row.chosen).backend == wanted
    forced = qk.explain("w8a8", n=48, k=200, m=1, backend="interpreted")
    if not torch.cuda.is_available():
        assert next(row for row in forced if row.chosen).kernel == "interpreted_int8_gemm"
    with pytest.raises(ValueError, match="n must be 1"):
        qk.explain("w4a16", n=0, k=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA"):
            qk.explain("w4a16", n=8, k=8, device="cuda")


@pytest.mark.parametrize("text", schemes.ALL)
def test_the_default_type_of_torch_changes_nothing(text):
    source, x = linear(), torch.randn(3, 200)
    want = quantized(text, source)(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = quantized(text, source)
        assert torch.equal(layer(x), want)
        again = WQLinear.from_weight(layer.to_weight(), backend="reference")
        assert again.dequantize().dtype == torch.float32
        assert torch.equal(again.dequantize(), layer.dequantize())
        assert again(x).dtype == x.dtype
    finally:
        torch.set_default_dtype(torch.float32)
