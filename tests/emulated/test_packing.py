"""pack.cu in the emulator: the same words as the layout's plain torch, from codes, AWQ and GPTQ."""

import pytest
import torch

from qkernels import WQLinear, WQLinear_GEMM
from qkernels.layouts import FRAGMENT, FRAGMENT_INT8, fragment, fragment_int8
from qkernels.scheme import QuantScheme
from tests.emulated.emulator import needs_emulator

pytestmark = needs_emulator

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes(n, k, bits):
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)


def in_words(fields):
    """[..., count] small integers -> int32 [...], the first in the lowest bits."""
    bits = 32 // fields.shape[-1]
    shifts = torch.arange(fields.shape[-1]) * bits
    return (fields.long() << shifts).sum(-1).to(torch.int32)


def pack(source, n, k, bits, kind, perm=None, slices=None):
    words = torch.empty_like(
        fragment.pack_fragment_torch(torch.zeros(n, k, dtype=torch.uint8), bits)
    )
    words.fill_(-1)
    for first, last in slices or ((0, n),):
        part = source[first:last] if kind == "codes" else source
        torch.ops.qkernels_emulated.pack_fragment(
            part, perm, words, n, k, first, last - first, bits, kind
        )
    return words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (64, 128), (100, 200)])
def test_codes(bits, n, k):
    codes = random_codes(n, k, bits)
    words = pack(codes, n, k, bits, "codes")
    assert torch.equal(words, fragment.pack_fragment_torch(codes, bits))
    for first, last in ((0, n), (n // 2, n), (0, 1)):
        got = torch.ops.qkernels_emulated.unpack_fragment(words, n, k, first, last - first, bits)
        assert torch.equal(got, codes[first:last])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_slices_leave_the_others_alone(bits):
    codes = random_codes(100, 72, bits)
    words = pack(codes, 100, 72, bits, "codes", slices=((64, 100), (0, 32), (32, 64)))
    assert torch.equal(words, fragment.pack_fragment_torch(codes, bits))


def pack_int8(codes, bits, slices=None):
    n, k = codes.shape
    words = torch.full(fragment.words_shape(n, k, bits), -1, dtype=torch.int32)
    for first, last in slices or ((0, n),):
        torch.ops.qkernels_emulated.pack_fragment_int8(
            codes[first:last], words, n, k, first, last - first, bits
        )
    return words


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (64, 128), (100, 200)])
def test_codes_of_integer_products(bits, n, k):
    codes = random_codes(n, k, bits)
    words = pack_int8(codes, bits)
    assert torch.equal(words, fragment_int8.pack_fragment_int8_torch(codes, bits))
    for first, last in ((0, n), (n // 2, n), (0, 1)):
        got = torch.ops.qkernels_emulated.unpack_fragment_int8(
            words, n, k, first, last - first, bits
        )
        assert torch.equal(got, codes[first:last])
    if n == 100:
        assert torch.equal(pack_int8(codes, bits, ((64, 100), (0, 32), (32, 64))), words)


@pytest.mark.parametrize("text", ["w4a8-g24-flat", "w8a8-g6", "w4a8"])
def test_the_layout_of_integer_products_packs_where_its_words_are(monkeypatch, text):
    scheme, codes = QuantScheme.parse(text), random_codes(70, 100, int(text[1]))
    made = []
    for operators in (None, torch.ops.qkernels_emulated):
        monkeypatch.setattr(fragment_int8, "packing_operators", lambda words, o=operators: o)
        words = FRAGMENT_INT8.allocate(scheme, 70, 100, codes.device).fill_(-1)
        FRAGMENT_INT8.pack_rows(scheme, words, 0, codes[:32])
        FRAGMENT_INT8.pack_rows(scheme, words, 32, codes[32:])
        made.append(words)
        assert torch.equal(FRAGMENT_INT8.unpack_rows(scheme, words, 0, 70, 100), codes)
        assert torch.equal(FRAGMENT_INT8.unpack_rows(scheme, words, 33, 50, 100), codes[33:50])
    assert torch.equal(*made)


def test_awq_words():
    n, k = 48, 80
    codes = random_codes(n, k, 4)
    awq = in_words(codes.t().unflatten(1, (-1, 8))[..., list(AWQ_ORDER)]).contiguous()
    assert torch.equal(pack(awq, n, k, 4, "awq"), fragment.pack_fragment_torch(codes, 4))
    parts = pack(awq, n, k, 4, "awq", slices=((32, 48), (0, 32)))
    assert torch.equal(parts, fragment.pack_fragment_torch(codes, 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_with_activation_order(bits):
    n, k = 40, 96
    codes = random_codes(n, k, bits)
    each_bit = codes.t()[:, None] >> torch.arange(bits)[:, None] & 1  # [K, bit, N]
    gptq = in_words(each_bit.reshape(-1, 32, n).transpose(1, 2)).contiguous()
    assert torch.equal(pack(gptq, n, k, bits, "gptq"), fragment.pack_fragment_torch(codes, bits))
    perm = torch.randperm(k)
    words = pack(gptq, n, k, bits, "gptq", perm.int())
    assert torch.equal(words, fragment.pack_fragment_torch(codes[:, perm], bits))


def test_wrong_input_is_named():
    codes = random_codes(64, 64, 4)
    words = fragment.pack_fragment_torch(codes, 4)
    call = torch.ops.qkernels_emulated.pack_fragment
    for arguments, message in (
        ((codes[:16], None, words, 64, 64, 16, 16, 4, "codes"), "multiple of 32"),
        ((codes, None, words, 64, 64, 32, 64, 4, "codes"), "multiple of 32"),
        ((codes, None, words, 64, 64, 0, 64, 5, "codes"), "4 or 8, got 5"),
        ((codes.int(), None, words, 64, 64, 0, 64, 4, "codes"), "uint8"),
        ((codes[:, :8], None, words, 64, 64, 0, 64, 4, "codes"), "shape"),
        ((codes, None, words, 96, 64, 0, 64, 4, "codes"), "words must have shape"),
        ((codes, None, words, 64, 64, 0, 64, 4, "marlin"), "codes, awq or gptq"),
        ((codes, torch.arange(64), words, 64, 64, 0, 64, 4, "codes"), "perm must be int32"),
        ((words, None, words, 64, 64, 0, 64, 4, "awq"), r"awq words must have shape \[64, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="10 rows from 60 on are not in 0 to 64"):
        torch.ops.qkernels_emulated.unpack_fragment(words, 64, 64, 60, 10, 4)
    call = torch.ops.qkernels_emulated.pack_fragment_int8
    for arguments, message in (
        ((codes[:16], words, 64, 64, 16, 16, 4), "multiple of 32"),
        ((codes, words, 64, 64, 0, 64, 3), "bits must be 4 or 8, got 3"),
        ((codes.int(), words, 64, 64, 0, 64, 4), "uint8"),
        ((codes[:, :8], words, 64, 64, 0, 64, 4), "shape"),
        ((codes, words, 64, 64, 0, 64, 8), "words must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        torch.ops.qkernels_emulated.unpack_fragment_int8(words, 64, 64, 0, 64, 2)
    with pytest.raises(ValueError, match="10 rows from 60 on are not in 0 to 64"):
        torch.ops.qkernels_emulated.unpack_fragment_int8(words, 64, 64, 60, 10, 4)


def test_awq_layers_go_to_the_kernels_without_being_unpacked(monkeypatch):
    layer = WQLinear_GEMM.from_linear(torch.nn.Linear(128, 48), 4, 64)
    want = layer.to_weight()
    x = torch.randn(3, 128)
    # In the fragment layout, x of fp32 is for the reference alone.
    expected = WQLinear.from_weight(want, backend="reference")(x)
    # As on a GPU: the CUDA kernels come first, and their operators pack.
    monkeypatch.setattr("qkernels.modules.awq.layout_for", lambda *arguments: FRAGMENT)
    monkeypatch.setattr(fragment, "packing_operators", lambda tensor: torch.ops.qkernels_emulated)
    monkeypatch.setattr(layer, "_load", None)
    packed = layer.packed_layer()
    assert "layout=fragment" in repr(packed)
    got = packed.to_weight()
    for name in ("codes", "scales", "zeros", "bias"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(packed(x), expected)
