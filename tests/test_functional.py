"""vLLM's operators: words, scales and zero points in, products out."""

import pytest
import torch

import qkernels as qk
from qkernels import functional
from qkernels.bits import pack_gptq, pack_gptq_zeros
from qkernels.errors import WeightError
from qkernels.integrations import words as words_of
from qkernels.modules import twins
from tests.integrations.modules import golden

GPTQ = {
    # folder -> bits, whether zero points are as they are
    "words-auto_round-auto_gptq-4bit": (4, False),
    "words-auto_round-auto_gptq-3bit": (3, False),
    "words-auto_round-auto_gptq-2bit": (2, False),
    "words-gptq_v2-2bit-desc-act": (2, True),
    "words-gptq_v2-8bit-sym": (8, True),
}


def identity(k):
    return torch.eye(k)


def awq():
    tensors, weight, _ = golden("words-awq-gemm-g32")
    return tensors["qweight"], tensors["scales"], tensors["qzeros"], weight


def gptq(folder):
    tensors, weight, _ = golden(folder)
    bits, v2 = GPTQ[folder]
    words = [tensors[name] for name in ("qweight", "qzeros", "scales")]
    return words, tensors.get("g_idx"), v2, bits, weight


def test_awq_gives_the_weight_of_the_package_bit_for_bit():
    words, scales, zeros, weight = awq()
    out = functional.awq_dequantize(words, scales, zeros, 0, 0, 0)
    assert out.dtype == scales.dtype and out.is_contiguous()
    assert torch.equal(out.t()[: len(weight)], weight.half())
    y = functional.awq_gemm(identity(len(words)), words, scales, zeros, 8)
    assert torch.equal(y.t()[: len(weight)], weight)


@pytest.mark.parametrize("folder", GPTQ)
def test_gptq_gives_the_weight_of_the_package_bit_for_bit(folder):
    words, index, v2, bits, weight = gptq(folder)
    y = functional.gptq_gemm(identity(weight.shape[1]), *words, index, False, v2, bits)
    assert y.shape == (weight.shape[1], words[0].shape[1])
    assert torch.equal(y.t()[: len(weight)], weight)


def test_groups_that_do_not_divide_the_columns_are_as_the_index_says():
    codes, zeros = torch.randint(0, 16, (32, 96)), torch.randint(0, 16, (32, 2))
    scales = torch.rand(2, 32, dtype=torch.float16)
    index = torch.arange(96, dtype=torch.int32) // 64
    words = pack_gptq(codes.byte(), 4), pack_gptq_zeros(zeros.byte(), 4), scales
    y = functional.gptq_gemm(identity(96), *words, index, False, True, 4)
    assert torch.equal(y, ((codes - zeros[:, index]) * scales.float().T[:, index]).T)


def test_an_index_without_elements_is_none():
    folder = "words-auto_round-auto_gptq-4bit"
    words, index, v2, bits, weight = gptq(folder)
    assert index is None
    empty = torch.empty(0, dtype=torch.int32)
    y = functional.gptq_gemm(identity(weight.shape[1]), *words, empty, False, v2, bits)
    assert torch.equal(y.t()[: len(weight)], weight)


def test_words_are_packed_once_and_again_where_they_or_their_meaning_change(monkeypatch):
    packed = []
    real = words_of._pack
    monkeypatch.setattr(words_of, "_pack", lambda *a: (packed.append(a[0]), real(*a))[1])
    words, _, _, bits, _ = gptq("words-auto_round-auto_gptq-4bit")
    x = torch.randn(2, 32 * len(words[0]) // bits, dtype=torch.bfloat16)

    def run(v2=False):
        y = functional.gptq_gemm(x, *words, None, False, v2, bits)
        assert y.dtype == x.dtype
        return y

    first = run()
    assert torch.equal(run(), first) and len(packed) == 1
    assert not torch.equal(run(v2=True), first) and packed[-1].format == "gptq_v2"
    assert torch.equal(run(), first)
    count = len(packed)
    words[2].mul_(2)
    assert torch.equal(run(), 2 * first) and len(packed) == count + 1
    assert (id(words[0].untyped_storage()), 0) in twins._twins


def test_compiled_and_checked():
    words, scales, zeros, _ = awq()
    x = torch.randn(3, len(words))

    def product(x):
        return functional.awq_gemm(x, words, scales, zeros, 8) + 1

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), product(x))
    n, tensors = scales.shape[1], [words, scales, zeros]
    spec = str(words_of.Words("awq", 4, n, len(words), 0, ("qweight", "scales", "qzeros")))
    operators = torch.ops.qkernels
    bias = torch.randn(n, requires_grad=True)
    for given in (x, x.clone().requires_grad_()):
        torch.library.opcheck(operators.words_linear.default, (given, tensors, bias, spec))
    torch.library.opcheck(operators.words_linear_grad_input.default, (product(x), tensors, spec))
    torch.library.opcheck(operators.words_dequantize.default, (tensors, spec))


def test_gradients_go_to_x():
    words, scales, zeros, _ = awq()
    x = torch.randn(2, 3, len(words), requires_grad=True)
    y = functional.awq_gemm(x, words, scales, zeros, 8)
    grad = torch.randn_like(y)
    y.backward(grad)
    whole = functional.awq_gemm(identity(len(words)), words, scales, zeros, 8)
    assert torch.allclose(x.grad, grad @ whole.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_gradients_go_to_a_bias(shape):
    tensors, weight, _ = golden("words-awq-gemm-g32")
    n, k = tensors["scales"].shape[-1], weight.shape[1]
    tensors = {name: tensors[name] for name in ("qweight", "scales", "qzeros")}
    x, bias = torch.randn(*shape, k), torch.zeros(n, requires_grad=True)
    y = words_of.linear(x, tensors, bias, format="awq", bits=4, n=n, k=k)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((n,), float(y.numel() // n)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_says_the_type(dtype):
    words, scales, zeros, _ = awq()
    x = torch.randn(2, len(words))
    plain = functional.awq_gemm(x.to(dtype), words, scales, zeros, 8)
    with torch.autocast("cpu", dtype=dtype):
        y = functional.awq_gemm(x, words, scales, zeros, 8)
        compiled = torch.compile(functional.awq_gemm, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, words, scales, zeros, 8), y)
    assert y.dtype == dtype and torch.equal(y, plain)


def test_what_is_wrong_is_said():
    words, scales, zeros, _ = awq()
    x = torch.randn(2, len(words))
    with pytest.raises(WeightError, match=r"x must have shape \[..., "):
        functional.awq_gemm(x[:, :-1], words, scales, zeros, 8)
    with pytest.raises(WeightError, match="qzeros must be int32"):
        functional.awq_gemm(x, words, scales, zeros[:, :-1], 8)
    for wrong in ((words, scales[0]), (words[0, 0], scales)):
        for function in (functional.awq_gemm, functional.awq_dequantize):
            given = (x,) if function is functional.awq_gemm else ()
            more = (8,) if given else (0, 0, 0)
            with pytest.raises(WeightError, match="must have two dimensions"):
                function(*given, *wrong, zeros, *more)
    words, _, v2, bits, weight = gptq("words-auto_round-auto_gptq-4bit")
    x = torch.randn(2, weight.shape[1])
    with pytest.raises(WeightError, match="b_gptq_scales must have two dimensions"):
        functional.gptq_gemm(x, *words[:2], words[2][0], None, False, v2, bits)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // 32
    for index in (groups - 1, groups + 2**30, groups.view(2, -1)):
        with pytest.raises(WeightError, match="g_idx must be"):
            functional.gptq_gemm(x, *words, index, False, v2, bits)
    with pytest.raises(WeightError, match="gptq_shuffle"):
        functional.gptq_gemm(x, *words, None, True, v2, bits)
    with pytest.raises(WeightError, match="of 5 bits"):
        functional.gptq_gemm(x, *words, None, False, v2, 5)
    assert qk.functional is functional
