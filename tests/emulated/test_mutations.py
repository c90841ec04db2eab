"""The emulator catches faults: without any one barrier, wait or mask, the tests turn red.

Every place where a kernel waits, or masks an access, is taken away on its own, in a forked process,
since a sanitizer ends the process that reads out of bounds.
"""

import multiprocessing
import os
from functools import lru_cache
from pathlib import Path

import torch

from qkernels import rounding
from qkernels.backends.cuda import weight_arguments
from qkernels.layouts import FRAGMENT, pack
from tests.emulated.emulator import (
    disabled,
    needs_emulator,
    product,
    set_seed,
    sites,
)

pytestmark = needs_emulator

FILES = ("mma.cuh", "dequantize.cu", "pack.cu")
KINDS = ("sync_threads", "sync_warp", "thread_fence", "copy_async_wait", "within")
SEEDS = range(12)


def exercise(check):
    """Runs every kernel on shapes with tails, and gives each result to `check(name, result)`."""
    torch.manual_seed(0)
    for text, m, n, k, schedule in (
        ("w4a16-g32", 3, 30, 584, {"tokens": 8, "split_k": 2, "stages": 2}),
        ("w4a16-g32", 5, 90, 1096, {"tokens": 8, "split_k": 1, "stages": 3}),
        ("w8a16-g64", 9, 97, 1096, {"tokens": 16, "split_k": 1, "stages": 2}),
        ("w4a16-g64", 9, 97, 1096, {"tokens": 16, "split_k": 1, "stages": 4}),
        ("w4a16-g64", 3, 36, 2600, {"tokens": 8, "split_k": 1, "stages": 5}),
        ("w4a16-g64", 3, 36, 2600, {"tokens": 8, "split_k": 1, "stages": 6}),
    ):
        weight = rounding.quantize(torch.randn(n, k), text, bias=torch.randn(n))
        # Heap memory of exactly the right size, so that a sanitizer sees what lies beyond it.
        x = torch.randn(m, k, dtype=torch.float16)
        packed = pack(weight, FRAGMENT)
        check("product", product(x, packed, weight.bias, **schedule))
        tensors, facts = weight_arguments(packed)
        operators = torch.ops.qkernels_emulated
        check("weight", operators.dequantize(*tensors, *facts, torch.float16))
        words = torch.empty_like(packed.buffers["words"])
        bits = weight.scheme.bits
        operators.pack_fragment(weight.codes, None, words, n, k, 0, n, bits, "codes")
        check("words", words)
        check("codes", operators.unpack_fragment(words, n, k, 0, n, bits))


@lru_cache(maxsize=1)
def truth():
    """What every kernel gives, in order, and where the kernels wait and mask."""
    results = []
    with sites() as found:
        exercise(lambda name, result: results.append(result))
    places = [
        (kind, Path(site["file"]).name, site["line"])
        for kind in KINDS
        for site in found.get(kind, [])
        if Path(site["file"]).name in FILES
    ]
    return results, places


def run_without(place):
    """Exits with 0 where nothing shows that `place` was taken away."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # what a sanitizer has to say is not news here
    expected = truth()[0]
    with disabled(*place):
        for seed in SEEDS:
            set_seed(seed)
            left = iter(expected)

            def check(name, result, left=left):
                if not torch.equal(result, next(left)):
                    os._exit(1)

            exercise(check)
    os._exit(0)


def is_caught(place):
    process = multiprocessing.get_context("fork").Process(target=run_without, args=(place,))
    process.start()
    process.join(60)
    assert process.exitcode is not None, f"{place}: still running after a minute"
    return process.exitcode != 0


def test_every_barrier_wait_and_mask_is_needed():
    _, places = truth()
    assert {kind for kind, _, _ in places} == set(KINDS)
    assert not is_caught(("within", "no_such_file.cu", 1))
    missed = [place for place in places if not is_caught(place)]
    assert not missed
