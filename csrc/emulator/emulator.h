// What a test asks of the emulator, also through ctypes. One launch runs at a time; no function may
// be called during one. Strings that are returned last until the next call of the same function.

#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// Draws the order of blocks and threads of the launches that follow from `seed`.
void qkernels_emulator_set_seed(uint64_t seed);

// Sets all counters to zero and forgets the regions; keeps what is disabled or required.
void qkernels_emulator_reset();

// A buffer in global memory whose traffic is counted under `name`, sector by sector.
void qkernels_emulator_register_region(const char* name, const void* begin, size_t bytes);

// Whether an access to global memory outside of every region ends the launch with an error, also
// where AddressSanitizer is not there to see it.
void qkernels_emulator_require_regions(int required);

// Whether two accesses to shared memory in no order, one of them a write, end the launch with an
// error, even if this run made them in the right order. Off unless asked for.
void qkernels_emulator_check_races(int checked);

// What the launches since the last reset did: see counters.h.
//
//     {"launches", "blocks", "switches": of fibers, "mma", "sync_warp": by warps,
//      "sync_threads": by blocks, "atomic_add": by threads, count_block too,
//      "global_load", "global_store", "copy_async":
//          {"instructions": of warps, "bytes": asked for, "sectors": of 32 bytes, touched},
//      "shared_load", "shared_store", "ldmatrix", "copy_async":
//          {"instructions", "wavefronts", "ideal_wavefronts": were there no bank conflicts},
//      "sites": [{"kind", "file", "line", "lane_bytes", and all of the above}],
//      "regions": {name: {"bytes": its size, "read": traffic, "written": traffic}}}
//
// where traffic is {"bytes", "sectors", "least", "most": how often the least and the most often
// touched sector was touched}.
const char* qkernels_emulator_counters_json();

// Where the launches since the last reset called what:
// {kind: [{"file", "line", "passes": by threads, "disabled"}]}, a kind being a function of ptx.cuh.
const char* qkernels_emulator_sites_json();

// Makes the calls of `kind` on line `line` of the file whose path ends in `file_suffix` faulty, and
// all others right again: sync_threads, sync_warp, copy_async_wait, wait_for_kernels_before, mma
// and stores do nothing, loads, ldmatrix and movmatrix give zeros, so do atomic_add and
// count_block, which count nothing, `within` is true, and copy_async_16 copies what is not valid. A
// null kind makes all calls right.
void qkernels_emulator_disable_site(const char* kind, const char* file_suffix, int line);

// Whether the launches that follow do nothing and, where they can be, succeed, so that what is left
// of the time of a call is the host's. They are counted as launches.
void qkernels_emulator_skip_launches(int skipped);

// Whether the launches that follow run the last block of their grid alone, so that the addresses of
// problems can be tried which no test can wait for.
void qkernels_emulator_run_last_blocks(int alone);

// Makes the launches in files whose path ends in `file_suffix` do nothing and fail with `error`, as
// on a GPU that the kernel was not compiled for, and all others right again. A null error makes
// them all right.
void qkernels_emulator_fail_launches(const char* file_suffix, const char* error);
}
