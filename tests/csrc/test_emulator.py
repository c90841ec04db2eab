"""csrc/emulator: small kernels, right and wrong, against plain arithmetic and exact counts."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "emulator_selftest.cu"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-DQKERNELS_EMULATOR", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]
NOT_WRITTEN = 0xFFFFFFFF  # what shared memory holds before


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({key for key, _ in pairs}) == len(pairs)
    return dict(pairs)


@dataclass(frozen=True)
class Emulator:
    program: Path

    def start(self, case: str, **options: object) -> subprocess.CompletedProcess[str]:
        arguments = [f"{key}={value}" for key, value in options.items()]
        # A leak checker cannot run under a debugger or in some sandboxes, and is not the point.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(
            [self.program, case, *arguments], capture_output=True, text=True, env=environment
        )

    def launches(self, case: str, **options: object) -> list[dict[str, Any]]:
        """What each launch did, of seeds 1, 2, ..."""
        done = self.start(case, **options)
        assert done.returncode == 0, done.stderr
        return [
            json.loads(line, object_pairs_hook=without_duplicates)
            for line in done.stdout.splitlines()
        ]

    def run(self, case: str, **options: object) -> dict[str, Any]:
        (launch,) = self.launches(case, **options)
        return launch


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("emulator")
    sources = [*sorted((ROOT / "csrc/emulator").glob("*.cpp")), ROOT / "tests/csrc" / SOURCE]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", "-x", "c++", "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, reversed(sources)))
    program = folder / "selftest"
    subprocess.run([compiler, "-fsanitize=address,undefined", *objects, "-o", program], check=True)
    return Emulator(program)


# --- Arithmetic


@dataclass(frozen=True)
class Format:
    name: str
    digits: int  # of the mantissa, the leading one too
    lowest: int  # the exponent of the least subnormal number
    limit: float  # infinite from here on, once rounded
    one: int
    special: tuple[int, ...]

    def number(self, bits: int) -> float:
        if self.name == "half":
            return float(np.uint16(bits).view(np.float16))
        return float(np.uint32(bits << 16).view(np.float32))

    def nearest(self, exact: Fraction, zero: float) -> float:
        """The number nearest to `exact`, ties to even; `zero` where that is 0, for its sign."""
        if exact == 0:
            return zero
        magnitude = abs(exact)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if magnitude < Fraction(2) ** exponent:
            exponent -= 1
        unit = Fraction(2) ** max(exponent - self.digits + 1, self.lowest)
        rounded = round(magnitude / unit) * unit
        value = float(rounded) if rounded < self.limit else float("inf")
        return -value if exact < 0 else value


FORMATS = [
    # 0, 1, 1 + 2^-5, 1 + 2^-6, largest, least normal and subnormal, largest subnormal, inf, nan
    Format(
        *("half", 11, -24, 65536.0, 0x3C00),
        (0, 0x3C00, 0x3C20, 0x3C10, 0x7BFF, 0x0400, 0x0001, 0x03FF, 0x7C00, 0x7E00),
    ),
    # 0, 1, 1 + 2^-3, 1 + 2^-5, largest, least normal and subnormal, 2^-100, inf, nan
    Format(
        *("bfloat16", 8, -133, 2.0**128, 0x3F80),
        (0, 0x3F80, 0x3F90, 0x3F84, 0x7F7F, 0x0080, 0x0001, 0x0D80, 0x7F80, 0x7FC0),
    ),
]


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


# --- Collectives


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


# --- Order


def test_a_missing_barrier_shows(emulator: Emulator) -> None:
    options = {"threads": 64, "words": 64, "launches": 4}
    right = [100 + (t + 1) % 64 for t in range(64)]
    assert all(launch["out"] == right for launch in emulator.launches("neighbour", **options))
    wrong = [launch["out"] != right for launch in emulator.launches("neighbour", mode=1, **options)]
    assert any(wrong)


@pytest.mark.parametrize(
    ("mode", "second", "first"),
    [
        (1, "load_shared", "store_shared"),
        (2, "store_shared", "load_shared"),
        (3, "load_shared", "store_shared"),
        (4, "copy_async_16", "load_shared"),
        (5, "load_shared", "copy_async_16"),
    ],
)
def test_races(emulator: Emulator, mode: int, second: str, first: str) -> None:
    options = {"races": 1, "threads": 64, "shared": 1024, "launches": 4}
    assert all(launch["error"] == "" for launch in emulator.launches("barriers", **options))
    for launch in emulator.launches("barriers", mode=mode, **options):
        error = launch["error"]
        assert "with no barrier after it was" in error
        orders = [(second, first), (first, second)]  # a run may come upon either
        assert any(f"{b} at " in error and f" in {a} at " in error for a, b in orders)


def test_the_seed_decides_the_order(emulator: Emulator) -> None:
    options = {"threads": 40, "blocks": 6, "words": 241}

    def order(seed: int) -> list[int]:
        return emulator.run("order", seed=seed, **options)["out"][1:]

    first = order(1)
    assert sorted(first) == list(range(240))
    assert order(1) == first
    assert order(2) != first
    blocks = [thread // 40 for thread in first[::40]]
    assert blocks != sorted(blocks)
    assert first[:40] != sorted(first[:40])


def test_warps_run_side_by_side_or_one_after_another(emulator: Emulator) -> None:
    changes = []
    for launch in emulator.launches("order", threads=64, words=65, launches=12):
        warps = [thread // 32 for thread in launch["out"][1:]]
        changes.append(sum(a != b for a, b in pairwise(warps)))
    assert min(changes) <= 4
    assert max(changes) >= 16


def test_copies_land_when_waited_for(emulator: Emulator) -> None:
    words = np.arange(4096, dtype=np.int64).astype(np.uint8).view(np.uint32)
    copied = words[: 32 * 4 : 4].tolist()
    n = 20
    expected = copied[:n] + [0] * (32 - n)  # zeros where the copy was not valid
    options = {"words": 32, "n": n}
    early = emulator.run("copy", mode=0, **options)
    assert early["out"] == [NOT_WRITTEN] * 32
    assert emulator.run("copy", mode=1, **options)["out"] == expected
    assert emulator.run("copy", mode=2, **options)["out"] == [NOT_WRITTEN] * 32  # not required yet
    assert emulator.run("copy", mode=3, **options)["out"] == [NOT_WRITTEN] * 32  # not committed
    neighbours = expected[1:] + expected[:1]
    for launch in emulator.launches("copy", mode=4, launches=3, **options):
        assert set(launch["out"]) <= {NOT_WRITTEN, *neighbours}
        assert launch["out"] != neighbours


def test_a_source_that_changes_under_way_is_an_error(emulator: Emulator) -> None:
    assert "the source changed while" in emulator.run("changed_source", threads=32)["error"]


@pytest.mark.parametrize(
    ("mode", "threads", "kinds"),
    [
        (0, 32, ["deadlock of 32 threads", "sync_threads at ", "sync_warp at "]),
        (1, 64, ["sync_threads at ", "other threads of the block wait for sync_threads at "]),
        (2, 32, ["mma at ", "other lanes of the warp wait for mma at "]),
        (3, 32, ["mma at ", "return"]),
    ],
)
def test_divergence_is_an_error(
    emulator: Emulator, mode: int, threads: int, kinds: list[str]
) -> None:
    for launch in emulator.launches("deadlock", mode=mode, threads=threads, launches=3):
        assert all(kind in launch["error"] for kind in kinds), launch["error"]
        assert launch["error"].count(SOURCE) == (1 if mode == 3 else 2)
        assert "block (0, 0, 0), thread " in launch["error"]


def test_threads_that_have_returned_are_not_waited_for(emulator: Emulator) -> None:
    launch = emulator.run("deadlock", mode=4, threads=64, words=64)
    assert launch["error"] == ""
    assert launch["out"] == [0] * 3 + [1] * 29 + [0] * 32


def test_a_launch_that_cannot_be(emulator: Emulator) -> None:
    assert "1025 threads a block" in emulator.run("order", threads=1025)["error"]
    assert "a grid of (0, 1, 1)" in emulator.run("order", blocks=0)["error"]
    assert "of shared memory; 0 to" in emulator.run("order", shared=1 << 20)["error"]


# --- Addresses


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (0, "load_shared at {}: offset 8 of shared memory is not aligned to 16 bytes"),
        (1, "store_shared at {}: offset 4 of shared memory is not aligned to 8 bytes"),
        (2, "ldmatrix at {}: offset"),
        (3, "copy_async_16 at {}: offset 8 of shared memory is not aligned to 16 bytes"),
        (4, "copy_async_16 at {}: global address"),
        (5, "load_global at {}: global address"),
        (6, "store_global at {}: global address"),
        (7, "load_shared at {}: offset 512 of shared memory is outside of its 512 bytes"),
        (8, "load_shared at {}: offset -16 of shared memory is outside of its 512 bytes"),
        (13, "load_global at {}: an address of shared memory"),
    ],
)
def test_wrong_addresses(emulator: Emulator, mode: int, message: str) -> None:
    lines = (ROOT / "tests/csrc" / SOURCE).read_text().splitlines()
    kernel = next(i for i, line in enumerate(lines) if "address_kernel" in line)
    line = next(i for i in range(kernel, len(lines)) if f"case {mode}:" in lines[i]) + 1
    error = emulator.run("address", mode=mode, words=32)["error"]
    assert message.format(f"{ROOT / 'tests/csrc' / SOURCE}:{line}") in error
    assert "block (0, 0, 0), thread " in error


@pytest.mark.parametrize(("mode", "n"), [(9, 4096), (10, 4096), (11, 32), (12, 0)])
def test_address_sanitizer_sees_the_end_of_buffers(emulator: Emulator, mode: int, n: int) -> None:
    done = emulator.start("address", mode=mode, n=n, words=32)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "address_kernel" in done.stderr


def test_required_regions(emulator: Emulator) -> None:
    inside = {"mode": 9, "n": 252, "region": 256, "words": 32}
    assert emulator.run("address", require=1, **inside)["error"] == ""
    outside = inside | {"n": 256}
    assert emulator.run("address", **outside)["error"] == ""
    assert (
        "outside of every registered region"
        in (emulator.run("address", require=1, **outside)["error"])
    )


# --- Counters


@pytest.mark.parametrize(
    ("mode", "name", "counts"),
    [
        (0, "global_load", {"instructions": 1, "bytes": 128, "sectors": 4}),  # coalesced
        (1, "global_load", {"instructions": 1, "bytes": 512, "sectors": 16}),  # 16 bytes a lane
        (2, "global_load", {"instructions": 1, "bytes": 128, "sectors": 32}),  # strided
        (3, "global_load", {"instructions": 1, "bytes": 128, "sectors": 1}),  # one word
        (4, "global_load", {"instructions": 2, "bytes": 128, "sectors": 4}),  # half of the lanes
        (5, "global_store", {"instructions": 1, "bytes": 128, "sectors": 8}),  # every other word
        (6, "copy_async", {"bytes": 256, "sectors": 16, "wavefronts": 4, "ideal_wavefronts": 4}),
        (7, "shared_load", {"instructions": 1, "wavefronts": 1, "ideal_wavefronts": 1}),
        (8, "shared_load", {"instructions": 1, "wavefronts": 2, "ideal_wavefronts": 1}),
        (9, "shared_load", {"instructions": 1, "wavefronts": 32, "ideal_wavefronts": 1}),
        (10, "shared_load", {"instructions": 1, "wavefronts": 1, "ideal_wavefronts": 1}),
        (11, "shared_load", {"instructions": 1, "wavefronts": 4, "ideal_wavefronts": 4}),
        (12, "shared_load", {"instructions": 1, "wavefronts": 2, "ideal_wavefronts": 2}),
        (13, "shared_store", {"instructions": 1, "wavefronts": 32, "ideal_wavefronts": 4}),
        (14, "ldmatrix", {"instructions": 1, "wavefronts": 32, "ideal_wavefronts": 4}),
        (15, "ldmatrix", {"instructions": 1, "wavefronts": 4, "ideal_wavefronts": 4}),  # swizzled
        (16, "shared_store", {"instructions": 1, "wavefronts": 1, "ideal_wavefronts": 1}),
        (17, "copy_async", {"bytes": 512, "sectors": 1, "wavefronts": 32, "ideal_wavefronts": 4}),
        (19, "global_load", {"instructions": 2, "bytes": 192, "sectors": 8}),
    ],
)
def test_counts(emulator: Emulator, mode: int, name: str, counts: dict[str, int]) -> None:
    launch = emulator.run("pattern", mode=mode, shared=4096)
    assert launch["error"] == ""
    counters = launch["counters"]
    assert {key: counters[name][key] for key in counts} == counts
    (site,) = counters["sites"]
    assert {key: site[key] for key in counts} == counts
    others = {
        "global_load",
        "global_store",
        "copy_async",
        "shared_load",
        "shared_store",
        "ldmatrix",
    }
    assert all(counters[other]["instructions"] == 0 for other in others - {name})


def test_regions(emulator: Emulator) -> None:
    counters = emulator.run("pattern", mode=18, region=512, words=32)["counters"]
    read = counters["regions"]["in"]["read"]
    assert read == {"bytes": 608, "sectors": 16, "least": 0, "most": 2}
    # Without the first sector, which was read twice, and the last one, never read, it is once.
    counters = emulator.run("pattern", mode=1, region=512, words=32)["counters"]
    region = counters["regions"]["in"]
    assert region["read"] == {"bytes": 512, "sectors": 16, "least": 1, "most": 1}
    assert region["written"] == {"bytes": 0, "sectors": 0, "least": 0, "most": 0}
    assert region["bytes"] == 512
    *_, launch = emulator.launches("neighbour", threads=64, words=64, region=32, launches=2)
    counters = launch["counters"]
    written = counters["regions"]["out"]["written"]
    assert written == {"bytes": 256, "sectors": 8, "least": 1, "most": 1}


def test_totals(emulator: Emulator) -> None:
    launch = emulator.run("neighbour", threads=64, blocks=3, words=192)
    counters = launch["counters"]
    assert (counters["launches"], counters["blocks"], counters["sync_threads"]) == (1, 3, 3)
    (site,) = launch["sites"]["sync_threads"]
    assert site["passes"] == 192
    assert emulator.run("warp_neighbour")["counters"]["sync_warp"] == 1


# --- Faults


@pytest.mark.parametrize(
    ("kind", "case", "options"),
    [
        ("sync_threads", "neighbour", {}),
        ("sync_warp", "warp_neighbour", {}),
        ("copy_async_wait", "copy", {"mode": 1, "n": 20}),
        ("within", "copy", {"mode": 1, "n": 20}),
        ("copy_async_16", "copy", {"mode": 1, "n": 20}),
    ],
)
def test_a_disabled_site_changes_the_result(
    emulator: Emulator, kind: str, case: str, options: dict[str, int]
) -> None:
    right = emulator.run(case, words=32, **options)
    sites = right["sites"][kind]
    lines = [site["line"] for site in sites if site["file"].endswith(SOURCE)]
    passed = [site["line"] for site in sites if site["passes"] == 32]
    assert lines == passed and len(lines) == 1
    disabled = {"disable": kind, "line": lines[0]}
    wrong = emulator.launches(case, words=32, launches=3, **disabled, **options)
    assert all(launch["error"] == "" for launch in wrong)
    assert any(launch["out"] != right["out"] for launch in wrong)
    assert [site["disabled"] for site in wrong[0]["sites"][kind]] == [1]
    # Neither another line, nor another file, nor another kind.
    for other in ({"line": lines[0] + 1}, {"file": "other.cu"}, {"disable": "store_global"}):
        again = emulator.run(case, words=32, **{**disabled, **other}, **options)
        assert again["out"] == right["out"]
