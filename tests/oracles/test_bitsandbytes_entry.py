"""bitsandbytes' own layers on our kernels, behind its entry point."""

import copy
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from qkernels.integrations import bitsandbytes as ours
from qkernels.modules import twins
from tests.bounds import FROBENIUS_BOUND
from tests.oracles.packages import ROOT, package

bnb = package("bitsandbytes")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def register():
    yield ours.register
    ours.unregister()


@pytest.fixture
def products(monkeypatch):
    """The products that ours ran, so that none of bitsandbytes' is taken for one."""
    ran = []
    for name in ("view_product", "forward"):
        real = getattr(ours.WQLinear, name)

        def counted(self, *arguments, real=real):
            ran.append(self)
            return real(self, *arguments)

        monkeypatch.setattr(ours.WQLinear, name, counted)
    return ran


def four_bits(n, k, dtype, quant_type="nf4", block=64, doubled=False, bias=True, **more):
    layer = bnb.nn.Linear4bit(k, n, bias, compute_dtype=dtype, quant_type=quant_type, **more)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(n, k) * 0.1,
        quant_type=quant_type,
        blocksize=block,
        compress_statistics=doubled,
        **more,
    )
    if bias:
        layer.bias.data = torch.randn(n, dtype=dtype)
    return layer.to("cpu").eval()


def eight_bits(n, k, threshold=0.0, bias=True):
    layer = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=threshold)
    weight = torch.randn(n, k, dtype=torch.float16)
    layer.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    return layer.to("cpu").eval()


def true_weight(layer):
    """What the words mean, in float64."""
    state, (n, k) = layer.weight.quant_state, layer.weight.quant_state.shape
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    words = layer.weight.data.view(torch.uint8).flatten()
    codes = torch.stack((words >> 4, words & 15), 1).flatten()[: n * k].long()
    scales = absmax.float().repeat_interleave(state.blocksize)[: n * k]
    return (state.code[codes] * scales).double().view(n, k)


def check(y, x, weight, bias):
    exact = x.double() @ weight.T
    if bias is not None:
        exact = exact + bias.double()
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = (y.double() - exact).norm() / exact.norm()
    assert error < FROBENIUS_BOUND[x.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("doubled", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_are_what_the_words_mean(register, products, quant_type, doubled, dtype):
    register()
    layer = four_bits(96, 256, dtype, quant_type, doubled=doubled)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for shape in ((1, 256), (5, 256), (2, 3, 256), (2, 2, 3, 256), (256,), (3, 1, 256)):
        x = torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            check(layer(x), x, true_weight(layer), layer.bias)
    assert layer(x[:0]).shape == (0, 1, 96)
    assert len(set(products)) == 1 and len(products) == 6
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize(("n", "k"), [(64, 96), (7, 100), (3, 2048), (64, 128)])
def test_any_block_also_where_it_crosses_rows(register, products, n, k, block):
    register()
    layer = four_bits(n, k, torch.float32, block=block, bias=False)
    x = torch.randn(3, k)
    check(layer(x), x, true_weight(layer), None)
    assert products
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(dense.double(), true_weight(layer).float().double())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_words_in_another_type_of_storage(register, products, storage):
    register()
    layer = four_bits(32, 64, torch.float32, quant_storage=storage)
    x = torch.randn(3, 64)
    check(layer(x), x, true_weight(layer), layer.bias)
    assert layer.weight.dtype == storage and products


@pytest.mark.parametrize("k", [96, 128])
def test_gradients_are_those_of_the_same_weight(register, products, k):
    register()
    layer = four_bits(64, k, torch.float32).train()
    layer.bias.requires_grad_()
    x = torch.randn(5, k, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    check(y.detach(), x.detach(), true_weight(layer), layer.bias.detach())
    check(x.grad, grad, true_weight(layer).T, None)
    assert torch.allclose(layer.bias.grad, grad.sum(0))
    assert products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bits_are_the_numbers_of_bitsandbytes(register, products, threshold, dtype):
    layer = eight_bits(96, 256, threshold)
    for shape in ((1, 256), (17, 256), (2, 3, 256)):
        x = torch.randn(shape, dtype=dtype)
        x[..., 7] *= 20
        with torch.no_grad():
            layer(x)
            theirs = layer(x)
            assert not products
            register()
            mine = layer(x)
            ours.unregister()
        assert len(products) == 1
        products.clear()
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        # Its constant for 1 / 127^2 has six right digits alone.
        assert error < FROBENIUS_BOUND[torch.bfloat16 if dtype == torch.bfloat16 else torch.float16]


def test_autocast_leaves_the_type(register):
    layer = four_bits(32, 64, torch.float32)
    x = torch.randn(2, 64)
    register()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bnb.matmul_4bit(x, layer.weight, layer.weight.quant_state)
    assert y.dtype == torch.float32
    check(y, x, true_weight(layer), None)


def test_words_are_packed_once_and_forgotten_with_the_layer(register, products):
    register()
    layer = four_bits(32, 64, torch.float32)
    x = torch.randn(2, 64)
    y = layer(x)
    held = len(twins._twins)
    assert torch.equal(layer(x), y) and len(twins._twins) == held
    layer.weight.quant_state.absmax.mul_(2)
    check(layer(x), x, true_weight(layer), layer.bias)
    products.clear()
    del layer
    assert len(twins._twins) == held - 1


def test_what_ours_do_not_take_goes_their_way(register, products, monkeypatch):
    register()
    layer = four_bits(64, 128, torch.float32, doubled=True)
    x = torch.randn(2, 128)
    monkeypatch.setattr(ours, "_is_faster", lambda *arguments: False)
    check(layer(x), x, true_weight(layer), layer.bias)
    y = eight_bits(64, 128)(x.half())
    assert y.isfinite().all()
    monkeypatch.undo()
    layer = four_bits(64, 128, torch.float32)
    layer.weight.quant_state.absmax[0] = float("nan")
    assert layer(x)[:, 0].isnan().all() and not layer(x)[:, 1:].isnan().any()
    assert not products


def test_a_layer_made_before_or_copied_does_not_repack(register):
    layer = four_bits(64, 128, torch.bfloat16)
    register()
    for made in (layer, copy.deepcopy(layer)):
        made(torch.randn(2, 128, dtype=torch.bfloat16))
        assert not getattr(made.weight.quant_state, "packing_format_for_cpu", False)
    repacks = made.support_avx512bf16_for_cpu
    ours.unregister()
    assert not repacks and layer.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()


def test_compiled(register, products):
    register()
    layer = four_bits(32, 64, torch.float32)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert products


def test_qlora_with_peft_trains(register, products):
    peft = pytest.importorskip("peft")
    register()
    model = torch.nn.Sequential(four_bits(64, 96, torch.float32), torch.nn.ReLU())
    model.append(four_bits(8, 64, torch.float32, doubled=True))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    x, wanted = torch.randn(16, 96), torch.randn(16, 8)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (tuned(x) - wanted).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert len(products) == 40


PROGRAM = """
import sys, warnings
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bitsandbytes as bnb
    {after}
import torch
layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu").eval()
layer(torch.randn(2, 64))
said = [str(w.message) for w in caught if "QKERNELS_" in str(w.message)]
twins = sys.modules.get("qkernels.modules.twins")
print(len(getattr(twins, "_twins", ())), len(said))
"""
INSTALLED = [e for e in entry_points(group="bitsandbytes.backends") if e.name == "qkernels"]
REGISTER = "" if INSTALLED else "import qkernels_bitsandbytes; qkernels_bitsandbytes.register()"
BROKEN = 'sys.modules["qkernels.integrations.bitsandbytes"] = None'


@pytest.mark.parametrize(
    ("said", "before", "expected"),
    [
        ("", "", "1 0"),
        ("cpu", "", "1 0"),
        ("0", "", "0 0"),
        ("gpu", "", "0 1"),
        ("", BROKEN, "0 1"),
    ],
)
def test_importing_bitsandbytes_is_all_that_is_needed(said, before, expected):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before, after=REGISTER)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "QKERNELS_BITSANDBYTES": said, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[-2] == expected
