import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels import compiled, rounding
from qkernels.bits import planar
from qkernels.errors import WeightError
from qkernels.layouts import (
    FRAGMENT,
    FRAGMENT_INT8,
    LAYOUTS,
    fragment,
    fragment_int8,
    pack,
    padding,
    plane_height,
    vnni,
)
from qkernels.scheme import QuantScheme
from qkernels.weight import QuantizedWeight, row_slices
from tests import schemes


def random_codes(n, k, bits):
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("text", schemes.ALL)
@pytest.mark.parametrize("with_perm", [False, True])
def test_layouts_give_back_what_was_packed(layout, text, with_perm, device):
    n, k = 37, 200
    scheme = QuantScheme.parse(text)
    weight = torch.randn(n, k, device=device)
    if layout.why_not(scheme) is not None:
        scale = schemes.activation_scale(scheme, weight)
        with pytest.raises(WeightError, match=f"the {layout.name} layout does not take"):
            pack(rounding.quantize(weight, scheme, activation_scale=scale), layout)
        return
    perm = torch.randperm(k, device=device) if with_perm else None
    scale = schemes.activation_scale(scheme, weight)
    before = rounding.quantize(weight, scheme, perm=perm, activation_scale=scale)
    after = pack(before, layout).unpack()
    assert torch.equal(before.codes, after.codes)
    assert list(before.fields) == list(after.fields)
    for name, value in before.fields.items():
        again = after.fields[name]
        assert value.dtype == again.dtype and torch.equal(value, again), name
    assert torch.equal(before.dequantize(), after.dequantize())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("text", schemes.ALL)
@pytest.mark.parametrize("with_perm", [False, True])
def test_rows_are_looked_up_one_by_one(layout, text, with_perm, device):
    n, k = 37, 200
    scheme, weight = QuantScheme.parse(text), torch.randn(n, k, device=device)
    if layout.why_not(scheme) is not None:
        pytest.skip(f"{layout.name} does not hold {text}")
    perm = torch.randperm(k, device=device) if with_perm else None
    scale = schemes.activation_scale(scheme, weight)
    quantized = rounding.quantize(weight, scheme, perm=perm, activation_scale=scale)
    rows = torch.tensor([36, 0, 7, 8, 9, 15, 16, 31, 8, 24], device=device)
    found = pack(quantized, layout).look_up(rows)
    assert found.dtype == torch.float32
    assert torch.equal(found, quantized.dequantize()[rows])
    assert pack(quantized, layout).look_up(rows[:0]).shape == (0, k)


@pytest.mark.parametrize("text", ["w2a16", "w3a16", "w4a16", "w4a8", "w2a8"])
@pytest.mark.parametrize("k", [16, 576, 1536, 4096, 11008, 14336])
def test_planes_are_tall_enough_for_the_product_and_pad_little(text, k):
    scheme = QuantScheme.parse(text)
    plane = plane_height(scheme, k)
    smallest = 32 if scheme.integer_activation else 16
    assert plane in (16, 32, 64) and plane >= smallest
    if plane > smallest:
        padded = planar.planar_rows(k, scheme.bits, plane) * (32 // scheme.bits)
        assert padded <= 1.07 * k


def test_slices_cover_all_rows_without_splitting_nested_blocks():
    for n, k in ((1, 1), (255, 10**6), (28672, 8192), (1000, 100)):
        slices = list(row_slices(n, k))
        assert slices[0][0] == 0 and slices[-1][1] == n
        assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))
        assert all(start % 256 == 0 for start, _ in slices)


def test_a_weight_of_several_slices(monkeypatch):
    monkeypatch.setattr("qkernels.weight.SLICE_ELEMENTS", 256 * 40)
    weight = torch.randn(700, 40)
    assert len(list(row_slices(700, 40))) == 3
    for text in ("nf4-g16-dq", "w4a16-g32", "w4a8-g32", "w4a16-gtensor"):
        quantized = rounding.quantize(weight, text)
        for layout in LAYOUTS.values():
            if layout.why_not(quantized.scheme) is not None:
                assert layout in (FRAGMENT, FRAGMENT_INT8)
                continue
            assert torch.equal(pack(quantized, layout).unpack().codes, quantized.codes)
        error = (quantized.dequantize() - weight).norm() / weight.norm()
        assert error < 0.2


def test_the_hub_refuses_what_does_not_fit():
    good = rounding.quantize(torch.randn(8, 64), "w4a16-g32")

    def build(**changes):
        parts = {name: getattr(good, name) for name in ("scheme", "codes", "scales", "zeros")}
        return QuantizedWeight(**{**parts, **changes})

    build()
    for changes, message in (
        ({"codes": good.codes + 8}, "below 16"),
        ({"codes": good.codes.int()}, "uint8"),
        ({"codes": good.codes[0]}, r"\[N, K\]"),
        ({"scales": good.scales[:, :1]}, r"shape \[8, 2\], got \[8, 1\]"),
        ({"scales": good.scales.float()}, "float16"),
        ({"scales": good.scales / 0}, "NaN or infinity"),
        ({"zeros": None}, "takes zeros"),
        ({"zeros": good.zeros[:4]}, "zeros"),
        ({"perm": torch.zeros(64, dtype=torch.int64)}, "each of 0..63 once"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"activation_scale": torch.tensor(1.0)}, "activation_scale"),
        ({"channel_scales": torch.ones(8)}, "channel_scales"),
        ({"scheme": QuantScheme.parse("w4a16-g32-sym")}, "takes no zeros"),
    ):
        with pytest.raises(WeightError, match=message):
            build(**changes)


def test_two_level_products_must_fit_int8():
    good = rounding.quantize(torch.randn(8, 64), "w4a8-g32")
    with pytest.raises(WeightError, match="must fit int8"):
        QuantizedWeight(
            scheme=good.scheme,
            codes=torch.zeros_like(good.codes),
            scales=torch.full_like(good.scales, 17),
            channel_scales=good.channel_scales,
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_fragments_are_what_a_tensor_core_takes(bits):
    """Lane 4g + t of a step of 16 columns: pairs of rows g, g + 8, columns 2t and 2t + 8."""
    n, k = 37, 200
    codes = random_codes(n, k, bits)
    words = fragment.pack_fragment_torch(codes, bits)
    steps = 16 // bits  # of 16 columns, in a unit
    assert words.shape == (4, 256 // (16 * steps), 32, 4)
    padded = torch.zeros(64, 256, dtype=torch.uint8)
    padded[:n, :k] = codes
    for tile, unit, g, t, step in itertools.product(
        range(4), range(words.shape[1]), (0, 5), (0, 3), range(steps)
    ):
        lane = words[tile, unit, 4 * g + t].tolist()
        own = lane[step : step + 1] if bits == 4 else lane[2 * step : 2 * step + 2]
        column = (unit * steps + step) * 16 + 2 * t
        for pair in range(4):
            row = tile * 16 + g + 8 * (pair % 2)
            for odd in (0, 1):
                word = own[0] if bits == 4 else own[pair // 2]
                field = pair + 4 * odd if bits == 4 else pair % 2 + 2 * odd
                code = (word >> (bits * field)) & ((1 << bits) - 1)
                assert code == padded[row, column + 8 * (pair // 2) + odd]
    assert torch.equal(fragment.unpack_fragment_torch(words, bits), padded)


@pytest.mark.parametrize("bits", [2, 3])
def test_fragments_of_low_bits_lie_in_spans(bits):
    """32 rows by 128 columns: the low two bits of each tile, then the third ones of both."""
    n, k = 37, 200
    codes = random_codes(n, k, bits)
    words = fragment.pack_fragment_torch(codes, bits)
    assert words.shape == (2, 2 * bits, 32, 4)
    padded = torch.zeros(64, 256, dtype=torch.uint8)
    padded[:n, :k] = codes
    for rows, span, tile, g, t, step, pair, odd in itertools.product(
        (0, 1), (0, 1), (0, 1), (0, 5), (0, 3), range(8), range(4), (0, 1)
    ):
        units = words[rows, span * bits : (span + 1) * bits, 4 * g + t]
        low = units[tile, step // 2].item()
        code = low >> (16 * odd + 8 * (step % 2) + 4 * (pair // 2) + 2 * (pair % 2)) & 3
        if bits == 3:
            third = units[2, tile * 2 + step // 4].item()
            code |= (third >> (16 * odd + 4 * (step % 4) + 2 * (pair % 2) + pair // 2) & 1) << 2
        row = rows * 32 + tile * 16 + g + 8 * (pair % 2)
        assert code == padded[row, span * 128 + step * 16 + 2 * t + 8 * (pair // 2) + odd]
    assert torch.equal(fragment.unpack_fragment_torch(words, bits), padded)


def test_the_fragment_layout_refuses_zero_points_it_cannot_subtract_exactly():
    weight = rounding.quantize(torch.randn(8, 64), "w4a16-g32")
    large = QuantizedWeight(
        scheme=weight.scheme,
        codes=weight.codes,
        scales=weight.scales,
        zeros=torch.full_like(weight.zeros, 129),
    )
    with pytest.raises(WeightError, match="up to 128, got 129"):
        pack(large, FRAGMENT)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_fragments_are_what_a_tensor_core_takes(bits):
    """Lane 4g + t of a step of 32 columns: rows g, g + 8, columns 4t and 4t + 16 and behind."""
    n, k = 37, 200
    codes = random_codes(n, k, bits)
    words = fragment_int8.pack_fragment_int8_torch(codes, bits)
    columns = 256 // bits  # of a unit
    assert words.shape == (4, 256 // columns, 32, 4)
    padded = torch.zeros(64, 256, dtype=torch.uint8)
    padded[:n, :k] = codes
    padded[:n, k:] = codes[:, -1:]
    for tile, unit, g, t, word, byte, step in itertools.product(
        range(4), range(words.shape[1]), (0, 5), (0, 3), range(4), range(4), range(8 // bits)
    ):
        held = words[tile, unit, 4 * g + t, word].item() >> (8 * byte)
        row = tile * 16 + g + 8 * (word % 2)
        column = unit * columns + 32 * step + 4 * t + 16 * (word // 2) + byte
        if bits == 4:
            assert held >> (4 * step) & 15 == padded[row, column]
        else:
            signed = (held & 255) - (held & 128) * 2
            assert signed == padded[row, column].item() - 128
    assert torch.equal(fragment_int8.unpack_fragment_int8_torch(words, bits), padded)


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    group=st.integers(1, 150),
    bits=st.sampled_from([4, 8]),
    s=st.integers(0),
)
@settings(deadline=None)
def test_padding_of_int8_fragments_repeats_the_last_column_of_its_group(n, k, group, bits, s):
    torch.manual_seed(s % 2**63)
    scheme, codes = QuantScheme.parse(f"w{bits}a8-g{group}-flat"), random_codes(n, k, bits)
    words = FRAGMENT_INT8.allocate(scheme, n, k, codes.device).fill_(-1)
    FRAGMENT_INT8.pack_rows(scheme, words, 0, codes)
    held = fragment_int8.unpack_fragment_int8_torch(words, bits)
    assert held.shape[0] % 32 == 0 and held.shape[1] % 64 == 0 and not held[n:].any()
    length = padding.kernel_group(scheme, k, 32)
    assert length % 32 == 0 or length >= k
    for column in range(held.shape[1]):
        g = min(column // length, scheme.groups(k) - 1)
        own = min(column - g * length, min(group, k - g * group) - 1)
        assert torch.equal(held[:n, column], codes[:, g * group + own])
    assert torch.equal(FRAGMENT_INT8.unpack_rows(scheme, words, 0, n, k), codes)
    columns = torch.randint(k, (7,))
    taken = FRAGMENT_INT8.take_columns(scheme, words, columns, n, k)
    assert torch.equal(taken, codes[:, columns])


def test_what_int8_fragments_hold():
    for text, reason in (
        ("w8a16", "is for int8 and int4 activations, and the scheme has 16-bit ones"),
        ("fp8-a8", "is for int8 and int4 activations, and the scheme has fp8 ones"),
        ("w3a8-g64", "holds weights of 4 and 8 bits, not of 3"),
        ("w2a4", "holds weights of 4 and 8 bits, not of 2"),
        ("w8a8-static", None),
        ("w4a4-g64-asym", None),
    ):
        assert FRAGMENT_INT8.why_not(QuantScheme.parse(text)) == reason


def test_int8_fragments_refuse_zero_points_that_leave_int8():
    one = rounding.quantize(torch.randn(8, 64), "w4a8-g32-asym-flat")
    with pytest.raises(WeightError, match="up to 128, got 129"):
        pack(one.replace(zeros=torch.full_like(one.zeros, 129)), FRAGMENT_INT8)
    # Of two levels it is the products that fit, whatever their factors are.
    two = rounding.quantize(torch.randn(8, 64), "w4a8-g32-asym")
    scales = torch.tensor([0, 1]).repeat(8, 1).to(torch.uint8)
    zeros = torch.tensor([200, 130]).repeat(8, 1).to(torch.uint8)
    codes = torch.full_like(two.codes, 7)
    held = pack(two.replace(scales=scales, zeros=zeros, codes=codes), FRAGMENT_INT8).unpack()
    assert torch.equal(held.zeros, zeros) and torch.equal(held.scales, scales)
    wide = two.replace(scales=torch.full_like(scales, 255), zeros=codes[:, :2], codes=codes)
    assert torch.equal(pack(wide, FRAGMENT_INT8).unpack().scales, wide.scales)


@given(n=st.integers(1, 40), k=st.integers(1, 150), nibbles=st.booleans(), s=st.integers(0))
@settings(deadline=None)
def test_vnni_follows_its_drawing_in_every_implementation(n, k, nibbles, s):
    torch.manual_seed(s % 2**63)
    codes = random_codes(n, k, 4 if nibbles else 8)
    words = vnni.pack_vnni_torch(codes, nibbles)
    step = 8 if nibbles else 4
    for row, column in {(0, 0), (n - 1, k - 1), (n // 2, k // 2)}:
        word = words[row // 16, column // step, row % 16].item()
        c = column % step
        code = word >> (8 * c if c < 4 else 8 * (c - 4) + 4) & (15 if nibbles else 255)
        assert code == codes[row, column]
    restored = vnni.unpack_vnni_torch(words, nibbles)
    assert restored.shape == (-(-n // 16) * 16, -(-k // 64) * 64)
    assert torch.equal(restored[:n, :k], codes)
    assert not restored[n:].any() and not restored[:, k:].any()
    extension = compiled.extension()
    if extension is None:
        return
    filled = torch.full_like(words, -1)
    extension.pack_vnni(codes, filled, 0, nibbles)
    assert torch.equal(filled, words)
    first, rows = n // 3, n - n // 3
    assert torch.equal(extension.unpack_vnni(words, first, rows, k, nibbles), codes[first:])


def test_wrong_arguments_of_the_compiled_vnni_packing_are_named():
    compiled = pytest.importorskip("qkernels._C")
    words = torch.zeros(2, 8, 16, dtype=torch.int32)
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="first_row must be a multiple of 16, got 8"):
        compiled.pack_vnni(codes, words, 8, True)
    with pytest.raises(ValueError, match="do not fit"):
        compiled.pack_vnni(codes, words, 32, True)
    with pytest.raises(ValueError, match="words must have shape"):
        compiled.pack_vnni(codes, words, 0, False)
    with pytest.raises(ValueError, match="rows 20 to 40 are not in words"):
        compiled.unpack_vnni(words, 20, 20, 64, True)
