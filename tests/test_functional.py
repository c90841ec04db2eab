"""vLLM's operators: words, scales and zero points in, products out."""

import pytest
import torch

import qkernels as qk
from qkernels import functional
from qkernels.errors import WeightError
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


def test_an_index_without_elements_is_none():
    folder = "words-auto_round-auto_gptq-4bit"
    words, index, v2, bits, weight = gptq(folder)
    assert index is None
    empty = torch.empty(0, dtype=torch.int32)
    y = functional.gptq_gemm(identity(weight.shape[1]), *words, empty, False, v2, bits)
    assert torch.equal(y.t()[: len(weight)], weight)


def test_words_are_packed_once_and_again_where_they_or_their_meaning_change(monkeypatch):
    packed = []
    real = functional._pack
    monkeypatch.setattr(functional, "_pack", lambda *a: (packed.append(a[1:]), real(*a))[1])
    words, _, _, bits, _ = gptq("words-auto_round-auto_gptq-4bit")
    x = torch.randn(2, 32 * len(words[0]) // bits, dtype=torch.bfloat16)

    def run(v2=False):
        y = functional.gptq_gemm(x, *words, None, False, v2, bits)
        assert y.dtype == x.dtype
        return y

    first = run()
    assert torch.equal(run(), first) and len(packed) == 1
    assert not torch.equal(run(v2=True), first) and packed[-1] == ("gptq_v2", bits)
    assert torch.equal(run(), first)
    count = len(packed)
    words[2].mul_(2)
    assert torch.equal(run(), 2 * first) and len(packed) == count + 1
    assert id(words[0].untyped_storage()) in twins._twins


def test_compiled_and_without_gradients():
    words, scales, zeros, _ = awq()
    x = torch.randn(3, len(words))

    def product(x):
        return functional.awq_gemm(x, words, scales, zeros, 8) + 1

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), product(x))
    checked = (x, [words, scales, zeros], "awq", 4)
    torch.library.opcheck(torch.ops.qkernels.words_linear.default, checked)
    torch.library.opcheck(torch.ops.qkernels.words_dequantize.default, checked[1:])


def test_what_is_wrong_is_said():
    words, scales, zeros, _ = awq()
    x = torch.randn(2, len(words))
    with pytest.raises(WeightError, match=r"x must be \[..., "):
        functional.awq_gemm(x[:, :-1], words, scales, zeros, 8)
    with pytest.raises(WeightError, match="qzeros must be int32"):
        functional.awq_gemm(x, words, scales, zeros[:, :-1], 8)
    words, _, v2, bits, weight = gptq("words-auto_round-auto_gptq-4bit")
    x = torch.randn(2, weight.shape[1])
    with pytest.raises(WeightError, match="gptq_shuffle"):
        functional.gptq_gemm(x, *words, None, True, v2, bits)
    with pytest.raises(WeightError, match="5 bits"):
        functional.gptq_gemm(x, *words, None, False, v2, 5)
    assert qk.functional is functional
