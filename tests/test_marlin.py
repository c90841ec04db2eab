"""vLLM's operators on words of Marlin, whose orders are written out here."""

import pytest
import torch

from qkernels import functional
from qkernels.bits import pack_awq, pack_dense, pack_gptq
from qkernels.errors import WeightError

N, K = 128, 64
SEVERAL = [i + 8 * j for i in range(8) for j in range(8)]
SINGLE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
IN_WORD = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}
IDS = {
    "uint4b8": 1125899907892224,
    "uint8b128": 1125899923621888,
    "uint4": 1125899906843648,
    "uint8": 1125899906844672,
}
"""Of vLLM's ScalarTypes: fields of 8, 8, 1, 32, 1 and 8 bits."""


def in_order(tensor, order):
    return tensor.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)


class Case:
    """A weight, and what vLLM's loader makes of it."""

    def __init__(self, bits, groups, has_zeros, dtype=torch.float16):
        self.bits = bits
        self.codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
        self.scales = (torch.rand(groups, N) + 0.5).to(dtype)
        zeros = torch.randint(0, 1 << bits, (groups, N), dtype=torch.uint8)
        if not has_zeros:
            zeros = torch.full_like(zeros, 1 << (bits - 1))
        index = torch.arange(K) * groups // K
        self.weight = (self.codes.T.float() - zeros[index]) * self.scales.float()[index]
        self.words = functional.gptq_marlin_repack(pack_gptq(self.codes, bits), K, N, bits)
        self.stored = in_order(self.scales, SEVERAL if groups > 1 else SINGLE)
        ordered = in_order(in_order(zeros, SEVERAL), IN_WORD[bits])
        self.zeros = pack_dense(ordered, bits) if has_zeros else None
        self.type = f"uint{bits}" + ("" if has_zeros else {4: "b8", 8: "b128"}[bits])

    def run(self, x, bias=None, *, of=None, **more):
        given = {
            "c": None,
            "b_bias": bias,
            "b_scales": self.stored,
            "a_scales": None,
            "global_scale": None,
            "b_zeros": self.zeros,
            "workspace": None,
            "b_q_type": of or self.type,
            "size_m": x.numel() // K,
            "size_n": N,
            "size_k": K,
        }
        return functional.marlin_gemm(x, b_q_weight=self.words, **{**given, **more})


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weight_bit_for_bit(bits, groups, has_zeros, dtype):
    case = Case(bits, groups, has_zeros, dtype)
    assert torch.equal(case.run(torch.eye(K)), case.weight)
    y = case.run(torch.eye(K, dtype=dtype))
    assert torch.equal(y, case.weight.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_follow_their_formula(bits):
    case = Case(bits, 1, False)
    count, mask = 32 // bits, (1 << bits) - 1
    for kt in range(K // 16):
        for nt in range(N // 64):
            for t in range(32):
                for w in range(4):
                    rows = [16 * kt + 2 * (t % 4) + more for more in (0, 1, 8, 9)]
                    n = 64 * nt + 16 * w + t // 4
                    v = [int(case.codes[column, k]) for column in (n, n + 8) for k in rows]
                    if bits == 4:
                        words = [case.words[kt, 128 * nt + 4 * t + w]]
                    else:
                        first = 256 * nt + 8 * t + 2 * w
                        words = [case.words[kt, first], case.words[kt, first + 1]]
                    for h, word in enumerate(words):
                        for i, order in enumerate(IN_WORD[bits]):
                            assert int(word) >> (bits * i) & mask == v[count * h + order]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_awq_give_the_same(bits):
    case = Case(bits, 2, True)
    rows = case.codes.T.contiguous()
    stored = pack_awq(rows) if bits == 4 else pack_dense(in_order(rows, IN_WORD[8]), 8)
    assert torch.equal(functional.awq_marlin_repack(stored, K, N, bits), case.words)


@pytest.mark.parametrize("name", IDS)
def test_a_type_is_its_id_its_name_or_vllms(name):
    case = Case(8 if "8" in name.replace("b8", "") else 4, 2, "b" not in name)
    assert case.type == name
    vllms = type("ScalarType", (), {"id": IDS[name]})()
    y = case.run(torch.eye(K))
    for given in (IDS[name], vllms):
        assert torch.equal(case.run(torch.eye(K), of=given), y)


def test_bias_output_and_any_shape():
    case = Case(4, 2, False)
    bias = torch.randn(N, dtype=torch.float16)
    x = torch.randn(2, 3, K, dtype=torch.float16)
    out = torch.empty(6, N, dtype=torch.float16)
    y = case.run(x, in_order(bias, SINGLE), c=out)
    assert y is out
    exact = x.flatten(0, 1).float() @ case.weight + bias.float()
    assert torch.allclose(y.float(), exact, rtol=1e-2, atol=2e-2)
    assert case.run(x[:0]).shape == (0, 3, N)


def test_groups_by_activations():
    case = Case(4, 4, False)
    perm = torch.randperm(K, dtype=torch.int32)
    groups = torch.arange(K, dtype=torch.int32) // 16
    given = (None, case.words, None, case.stored, None, None, groups, perm, None, case.type)
    y = functional.gptq_marlin_gemm(torch.eye(K), *given, K, N, K)
    # Row j of the words is row perm[j] of the weight.
    assert torch.equal(y[perm.long()], case.weight)
    plain = (*given[:6], groups[:0], groups[:0], None, case.type)
    assert torch.equal(functional.gptq_marlin_gemm(torch.eye(K), *plain, K, N, K), case.weight)
    wrong = (*given[:6], groups.flip(0), *given[7:])
    with pytest.raises(WeightError, match="groups of one size"):
        functional.gptq_marlin_gemm(torch.eye(K), *wrong, K, N, K)


def test_what_is_wrong_is_said():
    case = Case(4, 2, False)
    x = torch.randn(3, K)
    with pytest.raises(WeightError, match="uint4b8, uint8b128, uint4, uint8, not of the type 7"):
        case.run(x, of=7)
    with pytest.raises(WeightError, match="needs zero points"):
        case.run(x, of="uint4")
    with pytest.raises(WeightError, match="has no zero points"):
        case.run(x, b_zeros=torch.zeros(2, 16, dtype=torch.int32))
    for wrong in ({"size_m": 4}, {"size_n": 96}, {"size_k": 32}):
        with pytest.raises(WeightError, match="size_m, size_n, size_k are"):
            case.run(x, **wrong)
    with pytest.raises(WeightError, match="Marlin words of a weight"):
        case.run(x, size_n=64)
    for name in ("b_bias", "c", "b_scales"):
        with pytest.raises(WeightError, match=f"{name} must "):
            case.run(x, **{name: torch.zeros(5)})
    for name, value in (("a_scales", x), ("global_scale", x), ("is_zp_float", True)):
        with pytest.raises(WeightError, match=f"{name} is for types"):
            case.run(x, **{name: value})
    words = pack_gptq(case.codes, 4)
    for repack in (functional.gptq_marlin_repack, functional.awq_marlin_repack):
        with pytest.raises(WeightError, match="is_a_8bit"):
            repack(words, K, N, 4, True)
        with pytest.raises(WeightError, match="num_bits=2"):
            repack(words, K, N, 2)
        with pytest.raises(WeightError, match="b_q_weight must be int32"):
            repack(words[:-1], K, N, 4)
        with pytest.raises(WeightError, match="N of 64"):
            repack(words, K, 96, 4)
