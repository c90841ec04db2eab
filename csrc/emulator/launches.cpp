#include "emulator/launches.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
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
  bool last_alone = false;
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

// Nothing where the launch can be. In the time of a call that skips it, this counts too.
std::string wrong_launch(Index3 grid, int threads, int shared_bytes) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (threads < 1 || threads > kMaxThreads) {
    return text(threads) + " threads a block; 1 to " + text(kMaxThreads) + " are possible";
  }
  if (grid.x < 1 || grid.x > 0x7fffffffu || grid.y < 1 || grid.y > 0xffff || grid.z < 1 ||
      grid.z > 0xffff) {
    return "a grid of (" + text(grid.x) + ", " + text(grid.y) + ", " + text(grid.z) +
           "); 1 to (2147483647, 65535, 65535) are possible";
  }
  if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes) {
    return text(shared_bytes) + " bytes of shared memory; 0 to " + text(kMaxSharedBytes) +
           " are possible";
  }
  return {};
}

}  // namespace

const char* run_grid(Index3 grid, int threads, int shared_bytes, void (*call)(const void*),
                     const void* arguments, bool early, Place place) {
  static std::mutex one_at_a_time;
  static std::string last_error;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  ++totals().launches;
  if (switches.failing && ends_with(place.file, switches.file_suffix)) {
    return switches.error.c_str();
  }
  machine.error = wrong_launch(grid, threads, shared_bytes);
  machine.cancelled = !machine.error.empty();
  if (switches.skipped && !machine.cancelled) return nullptr;
  machine.call = call;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.shared_bytes = shared_bytes;
  machine.early = early;
  gridDim = dim3(grid.x, grid.y, grid.z);
  blockDim = dim3(static_cast<unsigned>(threads));
  if (!machine.cancelled) {
    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    const uint64_t first = switches.last_alone ? count - 1 : 0;
    std::vector<uint64_t> blocks(count - first);
    std::iota(blocks.begin(), blocks.end(), first);
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

void run_last_blocks(bool alone) { switches.last_alone = alone; }

void fail_launches(const char* file_suffix, const char* error) {
  switches.failing = error != nullptr;
  if (switches.failing) {
    switches.file_suffix = file_suffix;
    switches.error = error;
  }
}

}  // namespace qkernels::emulator
