#include "emulator/launches.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "emulator/builtins.h"
#include "emulator/machine.h"

namespace qkernels::emulator {
namespace {

constexpr int kMaxSharedBytes = 227 * 1024;  // sm_90 and sm_100; sm_80 has 163 KB, sm_86 99 KB

struct Switches {
  bool skipped = false;
  bool failing = false;
  std::string file_suffix, error;  // of the launches that fail
};

Switches switches;

void run_block() {
  // An allocation of its own for each block, of just these bytes, so that AddressSanitizer sees
  // accesses beyond; the bytes are NaN in every type.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, static_cast<size_t>(machine.shared_bytes)) != 0) {
    return set_error("no memory for the block's shared memory");
  }
  machine.shared = static_cast<unsigned char*>(memory);
  std::memset(memory, 0xff, static_cast<size_t>(machine.shared_bytes));
  run_threads();
  std::free(memory);
  machine.shared = nullptr;
  ++totals().blocks;
}

std::string wrong_launch(Index3 grid, int threads, int shared_bytes) {
  std::ostringstream text;
  if (threads < 1 || threads > kMaxThreads) {
    text << threads << " threads a block; 1 to " << kMaxThreads << " are possible";
  } else if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 0xffff || grid.z < 1 ||
             grid.z > 0xffff) {
    text << "a grid of (" << grid.x << ", " << grid.y << ", " << grid.z
         << "); 1 to (2147483647, 65535, 65535) are possible";
  } else if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    text << shared_bytes << " bytes of shared memory; 0 to " << kMaxSharedBytes << " are possible";
  }
  return text.str();
}

}  // namespace

const char* run_grid(Index3 grid, int threads, int shared_bytes, void (*call)(const void*),
                     const void* arguments, Place place) {
  static std::mutex one_at_a_time;
  static std::string last_error;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++totals().launches;
  if (switches.failing && ends_with(place.file, switches.file_suffix)) {
    return switches.error.c_str();
  }
  if (switches.skipped) return nullptr;
  machine.error = wrong_launch(grid, threads, shared_bytes);
  machine.cancelled = !machine.error.empty();
  machine.call = call;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  gridDim = dim3(grid.x, grid.y, grid.z);
  blockDim = dim3(static_cast<unsigned>(threads));
  if (!machine.cancelled) {
    std::vector<uint64_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), uint64_t{0});
    for (size_t i = blocks.size(); i > 1; --i) {
      std::swap(blocks[i - 1], blocks[machine.random.below(static_cast<uint32_t>(i))]);
    }
    for (const uint64_t block : blocks) {
      blockIdx = {static_cast<unsigned>(block % grid.x),
                  static_cast<unsigned>(block / grid.x % grid.y),
                  static_cast<unsigned>(block / grid.x / grid.y)};
      run_block();
      if (machine.cancelled) break;
    }
  }
  last_error = machine.error;
  return last_error.empty() ? nullptr : last_error.c_str();
}

void set_seed(uint64_t seed) { machine.random = Random(seed); }

void skip_launches(bool skipped) { switches.skipped = skipped; }

void fail_launches(const char* file_suffix, const char* error) {
  switches.failing = error != nullptr;
  if (switches.failing) {
    switches.file_suffix = file_suffix;
    switches.error = error;
  }
}

}  // namespace qkernels::emulator
