"""The emulator catches faults: without any one barrier, wait, mask, load or store, tests turn red.

Every place where a kernel waits, masks an access, loads, stores or multiplies is taken away on its
own, in a forked process, since a sanitizer ends the process that reads out of bounds.
"""

import multiprocessing
import os
import re
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qkernels import WQLinear, rounding, sparse
from qkernels.backends.cuda import weight_arguments
from qkernels.layouts import FRAGMENT, FRAGMENT_INT8, fragment, pack
from tests.emulated.emulator import (
    disabled,
    gradient,
    grouped_product,
    integer_product,
    needs_emulator,
    product,
    set_seed,
    sites,
)

pytestmark = needs_emulator

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SOURCES = [path for path in CUDA.rglob("*.cu*") if path.name != "ptx.cuh"]

FUNCTIONS = {  # of ptx.cuh, and what the emulator calls them
    **{
        name: name
        for name in ("sync_threads", "sync_warp", "copy_async_wait", "wait_for_kernels_before")
    },
    **{name: name for name in ("load_global", "load_global_written", "load_shared")},
    **{name: name for name in ("store_global", "store_shared", "count_block", "within")},
    "ldmatrix_x4": "ldmatrix",
    "movmatrix_trans": "movmatrix",
    "mma_m16n8k16": "mma",
    "mma_m16n8k32": "mma",
    "shuffle_xor": "shuffle",
}
SEEDS = range(12)


# Two products of different shapes split K: each counts with what the other left.
WEIGHTS = (
    ("w4a16-g32", 3, 30, 584, {"tokens": 8, "parts": 2, "stages": 2}),
    ("w4a16-g32", 5, 90, 1093, {"tokens": 8, "parts": 1, "stages": 3}),
    ("w8a16-g64", 9, 97, 1096, {"tokens": 16, "parts": 3, "stages": 2}),
    ("w4a16-g64", 9, 97, 1096, {"tokens": 16, "parts": 1, "stages": 4}),
    ("nf4-g64", 3, 36, 2600, {"tokens": 8, "parts": 1, "stages": 5}),
    ("w4a16-g64", 3, 36, 2600, {"tokens": 8, "parts": 1, "stages": 6}),
    ("w4a16-g64", 9, 140, 200, {"tokens": 32, "parts": 1, "stages": 2}),
    ("w3a16-g64", 9, 36, 1300, {"tokens": 16, "parts": 1, "stages": 3}),
    ("w2a16-g32", 3, 300, 520, {"tokens": 64, "parts": 2, "stages": 2}),
    # The second of three blocks has a piece of either tile.
    ("w4a16-g64", 3, 100, 1100, {"tokens": 8, "blocks": 3, "stages": 2}),
)


def exercise_weight(text, m, n, k, schedule, check):
    weight = rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n))
    # Heap memory of exactly the right size, so that a sanitizer sees what lies beyond it.
    x = F.pad(torch.randn(m, k, dtype=torch.float16), (0, -k % 8))
    packed = pack(weight, FRAGMENT)
    bias = weight.bias.to(torch.float16 if m == 9 else torch.float32)
    check("product", product(x, packed, bias, **schedule))
    tensors, facts = weight_arguments(packed)
    operators = torch.ops.qkernels_emulated
    check("weight", operators.dequantize(*tensors, *facts, torch.float16))
    words = torch.empty_like(packed.buffers["words"])
    bits = weight.scheme.bits
    operators.pack_fragment(weight.codes, None, words, n, k, 0, n, bits, "codes")
    check("words", words)
    check("codes", operators.unpack_fragment(words, n, k, 0, n, bits))


def exercise_floats(check):
    for n in (30, 36):
        weight = rounding.quantize(torch.randn(n, 200), "w3a16-g32")
        layer = WQLinear.from_weight(weight, backend="emulated")
        check("floats", layer(torch.randn(3, 200)))


def exercise_experts(check):
    """More tiles than ends that do not decrease could make, and rows of no expert.

    The tiles are of one weight, so that it does not matter which expert is the last to write a row.
    """
    one, other = (
        pack(rounding.quantize(torch.randn(70, 200), "w4a16-g32"), FRAGMENT) for _ in range(2)
    )
    for ends, experts in (
        ([3, 3, 12], [one, other, other]),
        ([20, 0, 20, 0, 20, 0, 20, 0, 18], [one] * 9),
    ):
        x = torch.randn(20, 200, dtype=torch.float16)
        check("experts", grouped_product(x, ends, experts, tokens=8, blocks=5))
        check("experts", grouped_product(x, ends, experts, tokens=8, parts=2))


def exercise_gradients(check):
    for text, m, n, k, schedule in (
        ("w4a16-g32", 3, 200, 300, {"tokens": 16, "parts": 2}),
        ("w8a16-g48", 3, 88, 328, {"tokens": 64, "parts": 1}),
        ("nf4-g64", 20, 328, 41, {"tokens": 16, "parts": 1}),
    ):
        packed = pack(rounding.quantize(torch.randn(n, k), text), FRAGMENT)
        dy = torch.randn(m, n, dtype=torch.float16)
        check("gradient", gradient(dy, packed, **schedule))


def exercise_packing(check):
    n, k = 40, 96
    perm = torch.randperm(k).int()
    for kind, bits, shape in (
        ("awq", 4, (k, n // 8)),
        ("gptq", 4, (k // 8, n)),
        ("gptq", 3, (k * 3 // 32, n)),
    ):
        any_words = torch.randint(-(2**31), 2**31, shape).int()
        words = torch.empty(fragment.words_shape(n, k, bits), dtype=torch.int32)
        torch.ops.qkernels_emulated.pack_fragment(any_words, perm, words, n, k, 0, n, bits, kind)
        check(kind, words)
    for bits in (4, 8):
        codes = torch.randint(1 << bits, (30, 72), dtype=torch.uint8)
        words = torch.empty(fragment.words_shape(30, 72, bits), dtype=torch.int32)
        torch.ops.qkernels_emulated.pack_fragment_int8(codes, words, 30, 72, 0, 30, bits)
        check("words", words)
        check("codes", torch.ops.qkernels_emulated.unpack_fragment_int8(words, 30, 72, 0, 30, bits))


# Whole sums and grouped ones.
INTEGERS = (
    ("w8a8", 3, 30, 584, {"tokens": 8, "parts": 2, "stages": 2}),
    ("w4a8-g32", 9, 97, 1096, {"tokens": 16, "parts": 1, "stages": 3}),
    ("w4a8-g64-flat-asym", 9, 36, 1300, {"tokens": 32, "parts": 1, "stages": 2}),
    ("w4a8-asym", 3, 300, 520, {"tokens": 64, "parts": 2, "stages": 2}),
)


def exercise_integer(text, m, n, k, schedule, check):
    """Products of int8: of x with zero points and without, and y for a reader."""
    weight = rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n))
    packed = pack(weight, FRAGMENT_INT8)
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    scale, zero = torch.rand(m) * 1e-2, torch.randint(-128, 128, (m,), dtype=torch.int32)
    for dtype, more in (
        (torch.float16, {"zero": zero}),
        (torch.float32, {}),
        (torch.bfloat16, {"y_scale": torch.tensor(0.3), "y_zero": torch.tensor(5).int()}),
    ):
        if "y_scale" in more:
            scale[1] = torch.nan
            more["row_scales"] = torch.empty(m)
        check(text, integer_product(x, scale, packed, weight.bias, dtype, **more, **schedule))
        if "y_scale" in more:
            check("row scales", more["row_scales"].nan_to_num())


def exercise_rows(check):
    """Whole pieces and tails, of rows of one warp and of several, in shared memory or a part."""
    rows = torch.ops.qkernels_emulated.quantize_rows
    for dtype in (torch.float16, torch.float32):
        for k, held in ((296, -1), (13, -1), (24, 256), (301, 256 + 32 * 4)):
            x, other = torch.randn(2, k).to(dtype), torch.randn(2, k).to(dtype)
            scale = torch.tensor(0.03)
            same, wide = torch.rand(k).to(dtype), torch.rand(k).bfloat16()
            for kind, second, gain, bias, scale_of in (
                ("plain", None, None, None, "asymmetric"),
                ("plain", None, None, None, "tensor"),
                ("layer_norm", other, same, wide, "token"),
                ("rms_norm", other, wide, None, "asymmetric"),
                ("silu_mul", other, None, None, "static"),
            ):
                given = scale if scale_of == "static" else None
                results = rows(
                    *(x, kind, second, gain, bias, 1e-5, scale_of, given, torch.int8),
                    *(kind != "plain", held),
                )
                for result in results:
                    if result is not None:
                        check(kind, result)
    for k in (296, 13):
        codes, scales, zeros, *_ = rows(
            *(torch.randn(2, k), "plain", None, None, None, 1e-5, "static", torch.tensor(0.03)),
            *(torch.int8, False, -1, torch.tensor(-7).int(), True),
        )
        for result in (codes, scales, zeros):
            check("padded rows", result)
    for dtype in (torch.float16, torch.float32):
        # In the first piece and in the last, of the last row; in two blocks, and by hundreds.
        for m, k, threshold, parts in ((19, 301, 2.9, 2), (3, 2700, 1.0, 1)):
            x = torch.randn(m, k).to(dtype)
            x[-1, 0] = x[-1, k - 1] = 5
            flags, columns, count = torch.ops.qkernels_emulated.find_outliers(x, threshold, parts)
            check("flags", flags)
            check("columns", columns[: int(count)])
            values, scales, *_ = rows(
                *(x, "plain", None, None, None, 1e-5, "token", None, torch.int8), left_out=flags
            )
            check("left out", values)
            check("scales", scales)


def exercise_beside(check):
    """Numbers beside the codes: more of a row than lanes, and none, of each type that is read."""
    m, n, k = 9, 33, 50
    mask = torch.rand(n, k) < 0.4
    mask[0], mask[3] = True, False
    for dtype, kind in (
        (torch.float16, torch.int16),
        (torch.float32, torch.int32),
        (torch.int8, torch.int32),
    ):
        held = sparse.fields_of(torch.randn(n, k), mask, torch.bfloat16)
        held["sparse_columns"] = held["sparse_columns"].to(kind)
        is_int8 = dtype == torch.int8
        x = (torch.randn(m, k) * (30 if is_int8 else 1)).to(dtype)
        y = torch.randn(m, n).to(torch.float16 if dtype == torch.float32 else torch.float32)
        rows = (torch.rand(m), torch.randint(-9, 9, (m,)).int()) if is_int8 else (None, None)
        columns = torch.tensor([7, 49, 0])
        result = torch.ops.qkernels_emulated.add_beside(
            *(y, x, columns, torch.randn(n, 3).half(), *held.values(), *rows),
            torch.float32 if is_int8 else torch.bfloat16,
        )
        check("beside", result)


def exercise_outliers(check):
    """More columns than lanes; groups with zero points and two levels, and floating ones; and what
    they add to y."""
    operators = torch.ops.qkernels_emulated
    for text, m, dtype in (
        ("w4a8-g64-asym", 9, torch.float16),
        ("w8a8-g32", 3, torch.bfloat16),
        ("w4a8-g32-flat", 9, torch.float32),
    ):
        n, k = 45, 128
        weight = rounding.quantize(torch.randn(n, k), text)
        held, group = pack(weight, FRAGMENT_INT8).buffers, weight.scheme.group_size
        tensors = (held["words"], held["scales"], held.get("zeros"), held.get("channel_scales"))
        listed = torch.randperm(k).int()
        x = torch.randn(m, k).to(dtype)
        sizes = (n, k, group, weight.scheme.bits)
        count = torch.tensor([70], dtype=torch.int32)
        addend = operators.multiply_outliers(x, listed, count, *tensors, *sizes)
        check("outliers", addend)
        codes = torch.randint(-9, 9, (m, k), dtype=torch.int8)
        check(
            "with outliers",
            operators.int8_mma(
                *(codes, torch.rand(m), None, *tensors, None, *sizes, dtype), addend=addend
            ),
        )


EXERCISES = (
    *(partial(exercise_weight, *case) for case in WEIGHTS),
    *(partial(exercise_integer, *case) for case in INTEGERS),
    exercise_floats,
    exercise_experts,
    exercise_gradients,
    exercise_packing,
    exercise_rows,
    exercise_beside,
    exercise_outliers,
)
"""All kernels, on shapes with tails; each gives what comes out to `check(name, result)`."""


def short(path):
    """weight_only/mma.cuh"""
    return "/".join(Path(path).parts[-2:])


def run(exercise, check):
    """An exercise draws the same numbers each time."""
    torch.manual_seed(0)
    exercise(check)


@lru_cache(maxsize=1)
def truth():
    """What every exercise gives, and where in the sources of the kernels it passes."""
    names = {short(path) for path in SOURCES}
    found = []
    for exercise in EXERCISES:
        results = []
        with sites() as passed:
            run(exercise, lambda name, result, results=results: results.append(result))
        places = [
            (kind, short(site["file"]), site["line"])
            for kind in FUNCTIONS.values()
            for site in passed[kind]
        ]
        found.append((results, [place for place in places if place[1] in names]))
    return found


def places():
    """All of them, in the order in which they are passed first."""
    return list(dict.fromkeys(place for _, passed in truth() for place in passed))


def written():
    """Where the sources of the kernels call these functions."""
    return {
        (FUNCTIONS[name], short(path), number)
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for name in re.findall(r"ptx::(\w+)", line.split("//")[0])
        if name in FUNCTIONS
    }


def run_without(place):
    """Exits with 0 where no exercise that passes `place` shows that it was taken away.

    All exercises run where none passes it.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a sanitizer has to say is not news here
    passing = [
        (exercise, results)
        for exercise, (results, passed) in zip(EXERCISES, truth(), strict=True)
        if place in passed or place not in places()
    ]
    with disabled(*place):
        for seed in SEEDS:
            set_seed(seed)
            for exercise, expected in passing:
                left = iter(expected)

                def check(name, result, left=left):
                    if not torch.equal(result, next(left)):
                        os._exit(1)

                run(exercise, check)
    os._exit(0)


def is_caught(place):
    process = multiprocessing.get_context("fork").Process(target=run_without, args=(place,))
    process.start()
    process.join(600)
    assert process.exitcode is not None, f"{place}: still running after ten minutes"
    return process.exitcode != 0


def test_every_place_is_exercised():
    assert set(places()) == written()
    assert {kind for kind, _, _ in written()} == set(FUNCTIONS.values())


def test_what_is_not_there_is_not_needed():
    assert not is_caught(("within", "no_such_file.cu", 1))


PARTS = 4
"""Of the places, so that several processes share them."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_place_is_needed(part):
    some = places()[part::PARTS]
    assert some
    assert not [place for place in some if not is_caught(place)]
