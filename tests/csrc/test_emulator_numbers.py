"""csrc/emulator: arithmetic and what a warp computes together, against plain arithmetic."""

from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.csrc.formats import FORMATS, SINGLE, Format
from tests.csrc.selftest import Emulator


def halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.uint16)


def bits_equal(form: Format, actual: int, expected: float) -> bool:
    value = form.number(actual)
    if np.isnan(expected):
        return actual == 0x7FFF
    return value == expected and np.signbit(value) == np.signbit(expected)


def run_words(
    emulator: Emulator, case: str, words: np.ndarray, path: Path, outputs: int
) -> np.ndarray:
    """`words` [3, n] in, [outputs, n] out."""
    words.tofile(path)
    n = words.shape[1]
    launch = emulator.run(case, **{"in": path}, n=n, words=outputs * n, threads=64)
    assert launch["error"] == ""
    return np.array(launch["out"], dtype=np.uint32).reshape(outputs, n)


def triples(form: Format, seed: int) -> np.ndarray:
    """Words [3, n]: special numbers of both signs by threes, then numbers of like exponents."""
    generator = np.random.default_rng(seed)
    signed = [bits | sign for bits in form.special for sign in (0, 0x8000)]
    special = np.array(list(product(signed[::2], signed, signed)), dtype=np.uint16).T
    near = form.one + generator.integers(-1 << 11, 1 << 11, size=(3, 600))
    near |= generator.integers(0, 2, size=near.shape) << 15
    any_bits = generator.integers(0, 1 << 16, size=(3, 600))
    numbers = np.concatenate([special, near, any_bits], axis=1).astype(np.uint16)
    return np.ascontiguousarray(numbers).view(np.uint32)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_pairs_round_once_to_nearest_even(emulator: Emulator, form: Format, tmp_path: Path) -> None:
    words = triples(form, seed=1)
    fma, sub, mul, _, wide = run_words(
        emulator, f"arithmetic_{form.name}", words, tmp_path / "in", 5
    )
    wrong = []
    with np.errstate(all="ignore"):
        for i, (a, b, c) in enumerate(zip(*(halves(row) for row in words), strict=True)):
            x, y, z = (np.float64(form.number(int(bits))) for bits in (a, b, c))
            # In float64 these have the right sign of zero, infinities and NaN.
            close = {"fma": x * y + z, "sub": x - y, "mul": x * y}
            if np.isfinite(x) and np.isfinite(y):
                p, q = Fraction(float(x)), Fraction(float(y))
                close["sub"] = form.nearest(p - q, close["sub"])
                close["mul"] = form.nearest(p * q, close["mul"])
                if np.isfinite(z):
                    close["fma"] = form.nearest(p * q + Fraction(float(z)), close["fma"])
            got = {"fma": halves(fma)[i], "sub": halves(sub)[i], "mul": halves(mul)[i]}
            wrong += [
                (name, hex(a), hex(b), hex(c), hex(got[name]), expected)
                for name, expected in close.items()
                if not bits_equal(form, int(got[name]), expected)
            ]
    assert wrong == []
    low = halves(words[0])[::2]
    expected = np.array([form.number(int(bits)) for bits in low], dtype=np.float32)
    np.testing.assert_array_equal(wide.view(np.float32), expected)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_pack2_rounds_as_torch(emulator: Emulator, form: Format, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    count = 12000
    bits = generator.integers(0, 1 << 32, size=count, dtype=np.uint32)
    # Exponents of fp16, subnormal and infinite results included; ties, and their neighbours.
    exponents = generator.integers(127 - 28, 127 + 18, size=count // 2, dtype=np.uint32)
    bits[: count // 2] = (bits[: count // 2] & 0x807FFFFF) | exponents << 23
    ties = bits[: count // 4]
    ties &= 0xFFFF0000 if form.name == "bfloat16" else 0xFFFFE000
    ties += (0x8000 if form.name == "bfloat16" else 0x1000) + generator.integers(
        -1, 2, size=ties.size
    ).astype(np.uint32)
    words = np.stack([bits[::2], bits[1::2], bits[::2]])
    packed = run_words(emulator, f"arithmetic_{form.name}", words, tmp_path / "in", 5)[3]
    dtype = torch.float16 if form.name == "half" else torch.bfloat16
    numbers = torch.from_numpy(bits.view(np.float32).copy())
    expected = numbers.to(dtype).view(torch.int16).numpy().view(np.uint16)
    expected = np.where(np.isnan(bits.view(np.float32)), 0x7FFF, expected)
    np.testing.assert_array_equal(halves(packed), expected)


def test_fp32_rounds_once_to_nearest_even(emulator: Emulator, tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    special = np.array(
        [0, 0x3F800000, 0x7F7FFFFF, 0x00800000, 1, 0x007FFFFF, 0x7F800000, 0x7FC00000, 0x3F800001],
        dtype=np.uint32,
    )
    signed = np.concatenate([special, special | np.uint32(1 << 31)])
    threes = np.array(list(product(signed, signed, signed[:9])), dtype=np.uint32).T
    near = generator.integers(0, 1 << 24, size=(3, 2000), dtype=np.uint32) + np.uint32(0x3F000000)
    any_bits = generator.integers(0, 1 << 32, size=(3, 2000), dtype=np.uint32)
    words = np.ascontiguousarray(np.concatenate([threes, near, any_bits], axis=1))
    got = run_words(emulator, "singles", words, tmp_path / "in", 7).view(np.float32)
    a, b, c = words.view(np.float32)
    with np.errstate(all="ignore"):
        expected = [a + b, a * b, None, a / b, np.sqrt(a), np.fmin(a, b), np.fmax(a, b)]
    for number, want in enumerate(expected):
        if want is not None:
            np.testing.assert_array_equal(got[number], want)
    with np.errstate(all="ignore"):
        sums = a.astype(np.float64) * b + c  # right but for the last places
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        sums[i] = SINGLE.nearest(exact, sums[i])
    np.testing.assert_array_equal(got[2], sums.astype(np.float32))


@pytest.mark.parametrize("mask", [1, 16, 31])
def test_lanes_exchange_words(emulator: Emulator, mask: int) -> None:
    launch = emulator.run("shuffle", n=mask, threads=64)
    assert launch["error"] == ""
    assert launch["out"][:64] == [thread ^ mask for thread in range(64)]


def test_integers(emulator: Emulator, tmp_path: Path) -> None:
    words = np.random.default_rng(3).integers(0, 1 << 32, size=(3, 500), dtype=np.uint32)
    a, b, c = words
    out = run_words(emulator, "integer", words, tmp_path / "in", 4)
    np.testing.assert_array_equal(out[0], (a & b) | c)
    np.testing.assert_array_equal(out[1], a ^ b ^ c)
    np.testing.assert_array_equal(out[2], ~a & ~b & ~c)
    for i in range(words.shape[1]):
        table = int(a[i]).to_bytes(4, "little") + int(b[i]).to_bytes(4, "little")
        expected = 0
        for place in range(4):
            nibble = int(c[i]) >> 4 * place & 15
            byte = table[nibble & 7]
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            expected |= byte << 8 * place
        assert out[3][i] == expected


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_mma_and_ldmatrix(
    emulator: Emulator, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    c = torch.randn(16, 8, generator=generator)
    path = tmp_path / "in"
    path.write_bytes(b"".join(t.view(torch.uint8).numpy().tobytes() for t in (a, b, c)))
    launch = emulator.run(f"mma_{name}", **{"in": path}, words=128, shared=1024)
    assert launch["error"] == ""
    out = np.array(launch["out"], dtype=np.uint32).view(np.float32).reshape(16, 8)
    expected = c.clone()
    for k in range(16):  # in the documented order
        expected += a[:, k : k + 1].float() * b[k : k + 1].float()
    np.testing.assert_array_equal(out, expected.numpy())
    assert launch["counters"]["mma"] == 1
    assert launch["counters"]["ldmatrix"]["instructions"] == 2


def test_mma_of_bytes(emulator: Emulator, tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    a, b = (generator.integers(-128, 128, size=(rows, 32), dtype=np.int8) for rows in (16, 8))
    c = generator.integers(-(2**31), 2**31, size=(16, 8), dtype=np.int32)
    path = tmp_path / "in"
    path.write_bytes(b"".join(each.tobytes() for each in (a, b, c)))
    launch = emulator.run("mma_bytes", **{"in": path}, words=128, shared=1024)
    assert launch["error"] == ""
    out = np.array(launch["out"], dtype=np.uint32).reshape(16, 8)
    exact = a.astype(np.int64) @ b.astype(np.int64).T + c
    np.testing.assert_array_equal(out, exact % 2**32)
    assert launch["counters"]["mma"] == 1


def test_movmatrix(emulator: Emulator, tmp_path: Path) -> None:
    matrix = np.random.default_rng(5).integers(0, 1 << 16, size=(8, 8)).astype(np.uint16)
    path = tmp_path / "in"
    matrix.tofile(path)
    launch = emulator.run("transpose", **{"in": path}, words=32)
    assert launch["error"] == ""
    out = np.array(launch["out"], dtype=np.uint32).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(out, matrix.T)
