"""csrc/emulator: small kernels, right and wrong: order, addresses, counters and switches."""

from itertools import pairwise

import numpy as np
import pytest

from tests.csrc.selftest import ROOT, SOURCE, Emulator

NOT_WRITTEN = 0xFFFFFFFF  # what shared memory holds before


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


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(1, "load_global"), (2, "store_global"), (3, "copy_async_16"), (4, "count_block")],
)
def test_a_kernel_that_starts_early_waits(emulator: Emulator, mode: int, kind: str) -> None:
    right = emulator.run("early", words=32)
    assert right["error"] == "" and right["out"] == [7] * 32
    assert right["sites"]["start_next_kernel"][0]["passes"] == 32
    error = emulator.run("early", mode=mode, words=32)["error"]
    assert f"{kind} at " in error and "the kernels before this one may not have ended" in error
    (site,) = right["sites"]["wait_for_kernels_before"]
    disabled = {"disable": "wait_for_kernels_before", "line": site["line"]}
    error = emulator.run("early", words=32, **disabled)["error"]
    assert "store_global at " in error and "may not have ended" in error


@pytest.mark.parametrize("mode", [5, 6])
def test_a_prefetch_is_of_whole_16_bytes(emulator: Emulator, mode: int) -> None:
    error = emulator.run("early", mode=mode, words=32)["error"]
    assert "prefetch at " in error and "no multiples of 16 bytes" in error


def test_a_prefetch_stays_inside(emulator: Emulator) -> None:
    inside = {"mode": 7, "words": 32, "n": 4096}
    assert emulator.run("early", **inside)["error"] == ""
    done = emulator.start("early", mode=7, words=32, n=4112)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    region = {"region": 2048, "require": 1}
    assert emulator.run("early", mode=7, words=32, n=2048, **region)["error"] == ""
    error = emulator.run("early", mode=7, words=32, n=2064, **region)["error"]
    assert "prefetch at " in error and "outside of every registered region" in error


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
        ("load_shared", "neighbour", {}),
        ("store_shared", "neighbour", {}),
        ("store_global", "neighbour", {}),
        ("atomic_add", "order", {"words": 33}),
        ("movmatrix", "transpose", {}),
    ],
)
def test_a_disabled_site_changes_the_result(
    emulator: Emulator, kind: str, case: str, options: dict[str, int]
) -> None:
    options = {"words": 32, **options}
    right = emulator.run(case, **options)
    sites = right["sites"][kind]
    lines = [site["line"] for site in sites if site["file"].endswith(SOURCE)]
    passed = [site["line"] for site in sites if site["passes"] == 32]
    assert lines == passed and len(lines) == 1
    disabled = {"disable": kind, "line": lines[0]}
    wrong = emulator.launches(case, launches=3, **disabled, **options)
    assert all(launch["error"] == "" for launch in wrong)
    assert any(launch["out"] != right["out"] for launch in wrong)
    assert [site["disabled"] for site in wrong[0]["sites"][kind]] == [1]
    # Neither another line, nor another file, nor another kind.
    for other in ({"line": lines[0] + 1}, {"file": "other.cu"}, {"disable": "mma"}):
        again = emulator.run(case, **{**disabled, **other}, **options)
        assert again["out"] == right["out"]


# --- Switches of launches


def test_a_skipped_launch_does_nothing_and_succeeds(emulator: Emulator) -> None:
    before, skipped, after = emulator.launches("order", words=33, launches=3, skip=1)
    assert skipped["error"] == "" and skipped["out"] == [0] * 33
    counters = skipped["counters"]
    assert (counters["launches"], counters["blocks"], counters["sites"]) == (1, 0, [])
    for launch in (before, after):
        assert sorted(launch["out"][1:]) == list(range(32))
        assert launch["counters"]["blocks"] == 1


def test_a_skipped_launch_that_cannot_be_fails(emulator: Emulator) -> None:
    assert "a grid of (0, 1, 1)" in emulator.run("order", blocks=0, skip=0)["error"]


def test_the_last_block_alone(emulator: Emulator) -> None:
    options = {"blocks": 5, "threads": 8, "words": 41}
    before, last, after = emulator.launches("order", launches=3, last=1, **options)
    assert sorted(last["out"][1:]) == [0] * 32 + list(range(32, 40))
    assert last["counters"]["blocks"] == 1
    for launch in (before, after):
        assert sorted(launch["out"][1:]) == list(range(40))
    # The last one of more than a machine could run.
    huge = emulator.run("order", blocks=0x7FFFFFFF, threads=1, words=2, last=0)
    assert huge["out"] == [1, 0x7FFFFFFE]


def test_a_failing_launch_does_nothing_and_says_so(emulator: Emulator) -> None:
    before, failing, after = emulator.launches("order", words=33, launches=3, fail=1)
    assert failing["error"] == "no such kernel" and failing["out"] == [0] * 33
    assert failing["counters"]["blocks"] == 0
    for launch in (before, after):
        assert launch["error"] == "" and sorted(launch["out"][1:]) == list(range(32))
    both = emulator.run("order", words=33, skip=0, fail=0)
    assert both["error"] == "no such kernel"
    elsewhere = emulator.run("order", words=33, fail=0, file="other.cu")
    assert elsewhere["error"] == "" and sorted(elsewhere["out"][1:]) == list(range(32))
