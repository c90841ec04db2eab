import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from qkernels import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast, rounding
from qkernels.bits import unpack_awq_fast
from qkernels.errors import LayerError, WeightError
from qkernels.modules import twins
from tests.integrations.modules import golden


def nibble(words, row, column_word, i):
    return (int(words[row, column_word]) >> (4 * i)) & 15


def case(cls, group_size=64, bias=True, k=256, n=48):
    linear = nn.Linear(k, n, bias=bias).half()
    fitted = rounding.fit(
        linear.weight.detach(), rounding.QuantScheme.parse(f"w4a16-g{group_size}")
    )
    scales, zeros = fitted.scales, fitted.zeros
    if cls is WQLinear_GEMM:
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    return linear, scales, zeros


def truth(linear, scales, zeros, cls, group_size):
    """Codes and weight by AutoAWQ's formula q = round((W + z*s) / s)."""
    if cls is WQLinear_GEMM:
        scales, zeros = scales.t(), zeros.t()
    s = scales.float().repeat_interleave(group_size, 1)
    z = zeros.float().repeat_interleave(group_size, 1)
    q = ((linear.weight.detach().float() + z * s) / s).round().clamp(0, 15)
    return q, (q - z) * s


@pytest.mark.parametrize("cls", [WQLinear_GEMM, WQLinear_GEMV])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_buffers_are_autoawqs(cls, group_size):
    linear, scales, zeros = case(cls, group_size)
    module = cls.from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
    codes, weight = truth(linear, scales, zeros, cls, group_size)
    n, k = linear.weight.shape
    groups = k // group_size
    z = zeros.t() if cls is WQLinear_GEMM else zeros
    if cls is WQLinear_GEMM:
        assert module.qweight.shape == (k, n // 8) and module.scales.shape == (groups, n)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        for row, word, i in ((0, 0, 0), (5, 3, 1), (k - 1, n // 8 - 1, 7), (100, 2, 4)):
            assert nibble(module.qweight, row, word, i) == codes[8 * word + order[i], row]
        for word, i in ((0, 1), (n // 8 - 1, 6)):
            assert nibble(module.qzeros, groups - 1, word, i) == z[8 * word + order[i], -1]
    else:
        multiple = {32: 4, 64: 2, 128: 1}[group_size]
        words = -(-groups // 8)
        width = -(-words // multiple) * multiple
        assert module.qweight.shape == (n, k // 8)
        assert module.qzeros.shape == (n, width) and module.scales.shape == (n, 8 * width)
        for row, word, i in ((0, 0, 0), (5, 3, 1), (n - 1, k // 8 - 1, 7)):
            assert nibble(module.qweight, row, word, i) == codes[row, 8 * word + i]
        assert nibble(module.qzeros, 7, 0, groups - 1) == z[7, groups - 1]
        assert not module.scales[:, groups:].any()
    assert torch.equal(module.to_weight().dequantize(), weight)
    x = torch.randn(2, 3, k).half()
    want = x.double() @ weight.double().t() + linear.bias.double()
    assert (module(x).double() - want).norm() / want.norm() < 1e-3
    for name in ("in_features", "out_features", "w_bit", "group_size"):
        assert hasattr(module, name)
    assert set(module.state_dict()) == {"qweight", "qzeros", "scales", "bias"}


def test_fast_buffers_are_autoawqs():
    tensors, weight, _ = golden("words-awq-gemv_fast-g64")
    rows, k = tensors["qweight"].shape
    module = WQLinear_GEMVFast(4, 64, k, 4 * rows, "bias" in tensors, "cpu")
    module.load_state_dict(tensors, strict=True)
    assert torch.equal(module.to_weight().dequantize()[: len(weight)], weight)
    assert module.interleave == 4

    linear, scales, zeros = case(WQLinear_GEMVFast, 64)
    module = WQLinear_GEMVFast.from_linear(linear, 4, 64, scales=scales, zeros=zeros)
    codes, _ = truth(linear, scales, zeros, WQLinear_GEMVFast, 64)
    assert module.qweight.shape == (12, 256) and module.qweight.dtype == torch.int16
    assert torch.equal(unpack_awq_fast(module.qweight), codes.to(torch.uint8))
    assert module.scales.shape == module.qzeros.shape == (16, 48)
    assert torch.equal(module.scales[:4], scales.T) and not module.scales[4:].any()
    products = (scales * zeros.float()).half().T
    assert torch.equal(module.qzeros[:4], -products) and not module.qzeros[4:].any()
    s, z = scales.float().repeat_interleave(64, 1), products.T.float().repeat_interleave(64, 1)
    assert torch.equal(module.to_weight().dequantize(), codes * s - z)


MODULES = pytest.mark.parametrize("cls", [WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast])


@MODULES
def test_init_only_is_filled_by_load_state_dict(cls):
    linear, scales, zeros = case(cls, bias=False)
    filled = cls.from_linear(linear, 4, 64, scales=scales, zeros=zeros)
    empty = cls.from_linear(linear, 4, 64, init_only=True)
    assert not empty.qweight.any()
    x = torch.randn(1, 256).half()
    empty(x)
    empty.load_state_dict(filled.state_dict())
    assert torch.equal(empty(x), filled(x))
    assert torch.equal(copy.deepcopy(filled)(x), filled(x))


@MODULES
def test_without_scales_it_rounds_to_nearest(cls):
    linear = nn.Linear(256, 48).half()
    module = cls.from_linear(linear, 4, -1 if cls is WQLinear_GEMM else 128)
    error = module.to_weight().dequantize() - linear.weight.detach().float()
    assert error.norm() / linear.weight.float().norm() < 0.1


def test_what_the_layouts_cannot_hold_is_named():
    linear, scales, zeros = case(WQLinear_GEMM)
    for arguments, named in (
        ((linear, 3, 64), "w_bit=3"),
        ((linear, 4, 100), "divisible by 100"),
        ((nn.Linear(256, 50), 4, 64), "divisible by 8"),
        ((nn.Conv2d(1, 1, 1), 4, 64), "Conv2d"),
        ((linear, 4, 64, False, scales), "both scales and zeros"),
        ((linear, 4, 64, False, scales.t(), zeros.t()), r"scales must be \[4, 48\]"),
        ((linear, 4, 64, False, scales, zeros.int() + 16), "0..15"),
    ):
        with pytest.raises(LayerError, match=named):
            WQLinear_GEMM.from_linear(*arguments)
    with pytest.raises(LayerError, match="groups of 32, 64"):
        WQLinear_GEMV.from_linear(linear, 4, 16)


def made(cls, bias=True):
    linear, scales, zeros = case(cls, bias=bias)
    module = cls.from_linear(linear, 4, 64, scales=scales, zeros=zeros)
    x = torch.randn(5, 256).half()
    exact = x.double() @ module.to_weight().dequantize().double().t()
    return module, x, exact if linear.bias is None else exact + linear.bias.double()


def scale(module, factor):
    """Multiplies the weight by a power of two, in place."""
    module.scales.mul_(factor)
    if module.version == "gemv_fast":
        module.qzeros.mul_(factor)


def right(y, exact):
    return y.dtype == torch.float16 and (y.double() - exact).norm() / exact.norm() < 1e-3


@MODULES
@pytest.mark.parametrize("bias", [True, False])
def test_in_inference_mode(cls, bias):
    module, x, exact = made(cls, bias)
    with torch.inference_mode():
        assert right(module(x), exact)
        other = cls(4, 64, 256, 48, bias, "cpu")
        other(x)
        other.load_state_dict(module.state_dict())
        assert right(other(x), exact)
        moved = copy.deepcopy(module).to("cpu").half()
        assert right(moved(x), exact)
        inside = made(cls, bias)
        assert right(inside[0](inside[1]), inside[2])
    assert right(other(x), exact) and right(module(x), exact)
    given = x.clone().requires_grad_()
    other(given).sum().backward()
    want = module.to_weight().dequantize().sum(0)
    assert (given.grad.float() - want).norm() / want.norm() < 1e-2


@MODULES
def test_what_is_written_to_the_buffers_counts(cls):
    module, x, exact = made(cls)
    assert right(module(x), exact)
    scale(module, 2)
    bias = module.bias.double()
    assert right(module(x), 2 * (exact - bias) + bias)
    module.scales = module.scales.clone()
    scale(module, 0.5)
    assert right(module(x), exact)
    module.bias.data = torch.zeros(48).half()
    assert right(module(x), exact - bias)
    module.qweight.zero_()
    module.qzeros.zero_()
    assert not module(x).any()


@MODULES
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole_and_exports(cls, dynamic):
    torch._dynamo.reset()  # which counts what other tests compiled
    module, x, exact = made(cls)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(2):
        assert right(compiled(x), exact)
    with torch.inference_mode():
        assert right(compiled(x), exact)
    scale(module, 2)
    assert right(compiled(x), 2 * (exact - module.bias.double()) + module.bias.double())
    scale(module, 0.5)
    exported = torch.export.export(module, (x,))
    assert right(exported.module()(x), exact)
    given = x.clone().requires_grad_()
    compiled(given).sum().backward()
    want = module.to_weight().dequantize().sum(0)
    assert (given.grad.float() - want).norm() / want.norm() < 1e-2


@MODULES
def test_copies_and_calls_with_other_buffers(cls):
    module, x, exact = made(cls)
    assert right(module(x), exact)
    assert right(copy.deepcopy(module)(x), exact)
    assert right(pickle.loads(pickle.dumps(module))(x), exact)
    assert right(torch.func.functional_call(module, module.state_dict(), (x,)), exact)
    meta = cls(4, 64, 256, 48, True, "meta")
    assert meta(x.to("meta")).shape == (5, 48)
    meta.load_state_dict(module.state_dict(), assign=True)
    assert right(meta(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.float()).dtype == torch.bfloat16
    before = len(twins._twins)
    for _ in range(3):
        views = {name: buffer.detach() for name, buffer in module.state_dict().items()}
        assert right(torch.func.functional_call(module, views, (x,)), exact)
    assert len(twins._twins) == before


@MODULES
def test_a_twin_goes_with_its_module(cls):
    module, x, _ = made(cls)
    before = set(twins._twins)
    module(x)
    (new,) = set(twins._twins) - before
    layer = weakref.ref(twins._twins[new].layer)
    del module
    gc.collect()
    assert new not in twins._twins and layer() is None


@MODULES
def test_wrong_x_is_named(cls):
    module, x, _ = made(cls)
    for wrong, message in ((x[:, :10], r"\[..., 256\]"), (x.double(), "float64")):
        with pytest.raises(WeightError, match=message):
            module(wrong)


@MODULES
def test_the_operator_is_one_of_torch(cls):
    module, x, _ = made(cls)
    sizes = [module.in_features, module.out_features, module.group_size]
    buffers = [module.qweight, module.qzeros, module.scales]
    for given in (x, x.clone().requires_grad_()):
        torch.library.opcheck(
            torch.ops.qkernels.awq_linear,
            (given, buffers, module.bias, cls.version, sizes),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
