// Kernels that do one thing each, right or wrong, for test_emulator.py, and those of ptx_probe.cu
// for test_ptx.py: `selftest CASE ARGUMENTS...` prints what the launch returned, what it left in
// its output, and the emulator's JSON.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "emulator/emulator.h"
#include "ptx_probe.cu"

namespace qkernels {
namespace {

QK_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

// --- Order

// out[t] is what thread t + 1 left in shared memory.
QK_KERNEL void neighbour_kernel(Arguments arguments) {
  auto* shared = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  const int t = thread_index();
  ptx::store_shared<uint32_t>(shared + t, 100 + t);
  if (arguments.mode == 0) ptx::sync_threads();
  const int next = (t + 1) % static_cast<int>(blockDim.x);
  const auto value = ptx::load_shared<uint32_t>(shared + next);
  ptx::store_global(arguments.out + blockIdx.x * blockDim.x + t, value);
}

// The same within a warp.
QK_KERNEL void warp_neighbour_kernel(Arguments arguments) {
  auto* shared = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  const int t = thread_index();
  ptx::store_shared<uint32_t>(shared + t, 100 + t);
  ptx::sync_warp();
  const auto value = ptx::load_shared<uint32_t>(shared + (t & ~31) + (t + 1) % 32);
  ptx::store_global(arguments.out + t, value);
}

// Copies 16 bytes and reads the first word of them before (mode 0) or after waiting; in mode 2 the
// group is left under way, in mode 3 not ended, in mode 4 the thread next to it reads, with no
// barrier.
QK_KERNEL void copy_kernel(Arguments arguments) {
  auto* shared = ptx::shared_memory();
  const int t = thread_index();
  int read = t;
  ptx::copy_async_16(shared + t * 16, arguments.in + t * 16, ptx::within(t, arguments.n));
  if (arguments.mode != 3) ptx::copy_async_commit();
  if (arguments.mode == 2) {
    ptx::copy_async_wait<1>();
  } else if (arguments.mode != 0) {
    ptx::copy_async_wait<0>();
  }
  if (arguments.mode == 4) read = (t + 1) % static_cast<int>(blockDim.x);
  ptx::store_global(arguments.out + t, ptx::load_shared<uint32_t>(shared + read * 16));
}

// The last thread of a warp changes what the others copy.
QK_KERNEL void changed_source_kernel(Arguments arguments) {
  const int t = thread_index();
  ptx::copy_async_16(ptx::shared_memory() + t * 16, arguments.out, true);
  ptx::copy_async_commit();
  ptx::sync_threads();
  if (t == 31) ptx::store_global<uint32_t>(arguments.out, 12345);
  ptx::sync_threads();
  ptx::copy_async_wait<0>();
}

// Right in mode 0: a word goes from thread to thread of a warp, then of the block, and is
// overwritten only after all have read it; a mode takes one of the barriers away.
QK_KERNEL void barriers_kernel(Arguments arguments) {
  auto* shared = reinterpret_cast<uint16_t*>(ptx::shared_memory());
  const int t = thread_index(), last = static_cast<int>(blockDim.x) - 1;
  ptx::store_shared<uint16_t>(shared + t, uint16_t{1});
  if (arguments.mode != 1) ptx::sync_warp();
  uint32_t sum = ptx::load_shared<uint16_t>(shared + (t ^ 31));
  if (arguments.mode != 2) ptx::sync_warp();
  ptx::store_shared<uint16_t>(shared + (t ^ 2), uint16_t{2});
  if (arguments.mode != 3) ptx::sync_threads();
  sum += ptx::load_shared<uint32_t>(shared + (last - t) / 2 * 2);
  if (arguments.mode != 4) ptx::sync_threads();
  ptx::copy_async_16(shared + t * 8, arguments.in, true);
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  if (arguments.mode != 5) ptx::sync_threads();
  sum += ptx::load_shared<uint4>(shared + (last - t) * 8).x;
  ptx::store_global(arguments.out + t, sum);
}

// The order in which blocks and threads come.
QK_KERNEL void order_kernel(Arguments arguments) {
  const uint32_t place = ptx::atomic_add(arguments.out, 1);
  ptx::store_global<uint32_t>(arguments.out + 1 + place, blockIdx.x * blockDim.x + threadIdx.x);
}

QK_KERNEL void deadlock_kernel(Arguments arguments) {
  const int t = thread_index();
  float c[4] = {};
  const uint32_t a[4] = {};
  switch (arguments.mode) {
    case 0:  // one lane waits for the block, the others of its warp for the warp
      if (t == 5) {
        ptx::sync_threads();
      } else {
        ptx::sync_warp();
      }
      break;
    case 1:  // two barriers
      if (t < 32) {
        ptx::sync_threads();
      } else {
        ptx::sync_threads();
      }
      break;
    case 2:  // two collectives in a warp
      if (t % 2 == 0) {
        ptx::mma_m16n8k16<Half>(c, a, 0, 0);
      } else {
        ptx::mma_m16n8k16<Half>(c, a, 0, 0);
      }
      break;
    case 3:  // a collective without a lane
      if (t != 7) ptx::mma_m16n8k16<Half>(c, a, 0, 0);
      break;
    case 4:  // right: who has returned is not waited for
      if (t % 32 < 3) return;
      ptx::sync_warp();
      if (t >= 32) return;
      ptx::sync_threads();
      break;
  }
  ptx::store_global<uint32_t>(arguments.out + t, 1);
}

// Started early, from mode 1 on before it waits.
QK_KERNEL void early_kernel(Arguments arguments) {
  uint32_t value = 0;
  ptx::start_next_kernel();
  ptx::prefetch(arguments.in + (arguments.mode == 5 ? 8 : 0), arguments.mode == 6 ? 24 : 32);
  if (arguments.mode == 7) ptx::prefetch(arguments.in, static_cast<uint32_t>(arguments.n));
  switch (arguments.mode) {
    case 1: value = ptx::load_global<uint32_t>(arguments.in); break;
    case 2: ptx::store_global<uint32_t>(arguments.out, 1); break;
    case 3: ptx::copy_async_16(ptx::shared_memory(), arguments.in, true); break;
    case 4: value = ptx::count_block(arguments.out); break;
  }
  ptx::copy_async_16_once(ptx::shared_memory() + threadIdx.x * 16, arguments.in, false);
  ptx::wait_for_kernels_before();
  ptx::store_global<uint32_t>(arguments.out + threadIdx.x, value + 7);
}

// --- Addresses

QK_KERNEL void address_kernel(Arguments arguments) {
  auto* shared = ptx::shared_memory();
  uint32_t r[4] = {};
  switch (arguments.mode) {
    case 0: r[0] = ptx::load_shared<uint4>(shared + 8).x; break;
    case 1: ptx::store_shared<uint2>(shared + 4, uint2{1, 2}); break;
    case 2: ptx::ldmatrix_x4(r, shared + threadIdx.x * 8); break;
    case 3: ptx::copy_async_16(shared + 8, arguments.in, true); break;
    case 4: ptx::copy_async_16(shared, arguments.in + 8, true); break;
    case 5: r[0] = ptx::load_global<uint2>(arguments.in + 4).x; break;
    case 6: ptx::store_global<uint32_t>(reinterpret_cast<char*>(arguments.out) + 2, 1); break;
    case 7: r[0] = ptx::load_shared<uint32_t>(shared + 512); break;
    case 8: r[0] = ptx::load_shared<uint4>(shared - 16).x; break;
    case 9: r[0] = ptx::load_global<uint32_t>(arguments.in + arguments.n); break;
    case 10: ptx::copy_async_16(shared, arguments.in + arguments.n, true); break;
    case 11: ptx::store_global<uint32_t>(arguments.out + arguments.n, 1); break;
    case 12: shared[512] = 1; break;  // with no function of ptx.cuh
    case 13: r[0] = ptx::load_global<uint32_t>(shared); break;
  }
  ptx::store_global(arguments.out + threadIdx.x, r[0] + r[1] + r[2] + r[3]);
}

// --- Collectives

// in: a [16, 16], b [16, 8] of 16-bit numbers, c [16, 8] of fp32; out: c. Both operands come
// through ldmatrix: a as its four matrices, b from its transpose.
template <class T>
QK_KERNEL void mma_kernel(Arguments arguments) {
  const int lane = thread_index(), group = lane / 4, t = lane % 4;
  auto* shared = ptx::shared_memory();
  const unsigned char* c_in = arguments.in + 512 + 256;
  const auto* b_in = reinterpret_cast<const uint16_t*>(arguments.in + 512);
  ptx::store_shared(shared + lane * 16, ptx::load_global<uint4>(arguments.in + lane * 16));
  for (int i = lane; i < 128; i += 32) {
    const int column = i / 16, row = i % 16;
    ptx::store_shared(shared + 512 + i * 2, ptx::load_global<uint16_t>(b_in + row * 8 + column));
  }
  ptx::sync_warp();
  uint32_t a[4], b[4];
  float c[4];
  ptx::ldmatrix_x4(a, shared + (lane % 16) * 32 + lane / 16 * 16);
  ptx::ldmatrix_x4(b, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  for (int i = 0; i < 4; ++i) {
    const int at = (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    c[i] = ptx::as_float(ptx::load_global<uint32_t>(c_in + at * 4));
  }
  ptx::mma_m16n8k16<T>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) {
    const int at = (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    ptx::store_global(arguments.out + at, c[i]);
  }
}

// in: a [16, 32], b [8, 32] of bytes, c [16, 8] of int32; out: c. Both operands come through
// ldmatrix.
QK_KERNEL void mma_bytes_kernel(Arguments arguments) {
  const int lane = thread_index(), group = lane / 4, t = lane % 4;
  auto* shared = ptx::shared_memory();
  const unsigned char* c_in = arguments.in + 512 + 256;
  ptx::store_shared(shared + lane * 16, ptx::load_global<uint4>(arguments.in + lane * 16));
  ptx::store_shared(shared + 512 + lane * 8,
                    ptx::load_global<uint2>(arguments.in + 512 + lane * 8));
  ptx::sync_warp();
  uint32_t a[4], b[4];
  int32_t c[4];
  ptx::ldmatrix_x4(a, shared + (lane % 16) * 32 + lane / 16 * 16);
  ptx::ldmatrix_x4(b, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  for (int i = 0; i < 4; ++i) {
    const int at = (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    c[i] = ptx::load_global<int32_t>(c_in + at * 4);
  }
  ptx::mma_m16n8k32(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) {
    const int at = (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    ptx::store_global(arguments.out + at, c[i]);
  }
}

// in: a matrix [8, 8] of 16-bit numbers; out: its transpose.
QK_KERNEL void transpose_kernel(Arguments arguments) {
  const int lane = thread_index();
  const auto word = ptx::load_global<uint32_t>(arguments.in + lane * 4);
  ptx::store_global(arguments.out + lane, ptx::movmatrix_trans(word));
}

// in: n words of a, of b, and of c; out: n words each of fma2, sub2, mul2, pack2(fp32 a, fp32 b),
// and the fp32 numbers of the low half of a.
template <class T>
QK_KERNEL void arithmetic_kernel(Arguments arguments) {
  const int64_t n = arguments.n;
  const auto* in = reinterpret_cast<const uint32_t*>(arguments.in);
  for (int64_t i = thread_index(); i < n; i += blockDim.x) {
    const auto a = ptx::load_global<uint32_t>(in + i);
    const auto b = ptx::load_global<uint32_t>(in + n + i);
    const auto c = ptx::load_global<uint32_t>(in + 2 * n + i);
    ptx::store_global(arguments.out + i, ptx::fma2<T>(a, b, c));
    ptx::store_global(arguments.out + n + i, ptx::sub2<T>(a, b));
    ptx::store_global(arguments.out + 2 * n + i, ptx::mul2<T>(a, b));
    ptx::store_global(arguments.out + 3 * n + i, ptx::pack2<T>(ptx::as_float(a), ptx::as_float(b)));
    ptx::store_global(arguments.out + 4 * n + i,
                      ptx::to_float<T>(static_cast<uint16_t>(a & 0xffff)));
  }
}

// The same words as fp32; out: add, mul, fma, divide, sqrt, min and max of them.
QK_KERNEL void singles_kernel(Arguments arguments) {
  const int64_t n = arguments.n;
  const auto* in = reinterpret_cast<const uint32_t*>(arguments.in);
  for (int64_t i = thread_index(); i < n; i += blockDim.x) {
    const float a = ptx::as_float(ptx::load_global<uint32_t>(in + i));
    const float b = ptx::as_float(ptx::load_global<uint32_t>(in + n + i));
    const float c = ptx::as_float(ptx::load_global<uint32_t>(in + 2 * n + i));
    ptx::store_global(arguments.out + i, ptx::add(a, b));
    ptx::store_global(arguments.out + n + i, ptx::mul(a, b));
    ptx::store_global(arguments.out + 2 * n + i, ptx::fma(a, b, c));
    ptx::store_global(arguments.out + 3 * n + i, ptx::divide(a, b));
    ptx::store_global(arguments.out + 4 * n + i, ptx::sqrt(a));
    ptx::store_global(arguments.out + 5 * n + i, ptx::min(a, b));
    ptx::store_global(arguments.out + 6 * n + i, ptx::max(a, b));
  }
}

// The same words; out: lop3 of (a & b) | c, of a ^ b ^ c, of ~a & ~b & ~c, and prmt(a, b, c).
QK_KERNEL void integer_kernel(Arguments arguments) {
  const int64_t n = arguments.n;
  const auto* in = reinterpret_cast<const uint32_t*>(arguments.in);
  for (int64_t i = thread_index(); i < n; i += blockDim.x) {
    const auto a = ptx::load_global<uint32_t>(in + i);
    const auto b = ptx::load_global<uint32_t>(in + n + i);
    const auto c = ptx::load_global<uint32_t>(in + 2 * n + i);
    ptx::store_global(arguments.out + i, ptx::lop3<0xea>(a, b, c));
    ptx::store_global(arguments.out + n + i, ptx::lop3<0x96>(a, b, c));
    ptx::store_global(arguments.out + 2 * n + i, ptx::lop3<0x01>(a, b, c));
    ptx::store_global(arguments.out + 3 * n + i, ptx::prmt(a, b, c));
  }
}

// Each thread's number from lane ^ n.
QK_KERNEL void shuffle_kernel(Arguments arguments) {
  const uint32_t got = ptx::shuffle_xor(threadIdx.x, static_cast<int>(arguments.n));
  ptx::store_global(arguments.out + threadIdx.x, got);
}

// --- Counters: each mode one pattern of one warp

QK_KERNEL void pattern_kernel(Arguments arguments) {
  auto* shared = ptx::shared_memory();
  const unsigned char* in = arguments.in;
  const int lane = thread_index();
  uint32_t r[4];
  switch (arguments.mode) {
    case 0: ptx::load_global<uint32_t>(in + lane * 4); break;
    case 1: ptx::load_global<uint4>(in + lane * 16); break;
    case 2: ptx::load_global<uint32_t>(in + lane * 128); break;
    case 3: ptx::load_global<uint32_t>(in); break;
    case 4:  // masked: half of the lanes, twice
      for (int i = 0; i < 2; ++i) {
        if (lane < 16) ptx::load_global<uint32_t>(in + i * 64 + lane * 4);
      }
      break;
    case 5: ptx::store_global<uint32_t>(arguments.out + lane * 2, 1); break;
    case 6: ptx::copy_async_16(shared + lane * 16, in + lane * 16, lane % 2 == 0); break;
    case 7: ptx::load_shared<uint32_t>(shared + lane * 4); break;
    case 8: ptx::load_shared<uint32_t>(shared + lane * 8); break;
    case 9: ptx::load_shared<uint32_t>(shared + lane * 128); break;
    case 10: ptx::load_shared<uint32_t>(shared); break;
    case 11: ptx::load_shared<uint4>(shared + lane * 16); break;
    case 12: ptx::load_shared<uint2>(shared + lane * 8); break;
    case 13: ptx::store_shared<uint4>(shared + lane * 128, uint4{1, 2, 3, 4}); break;
    case 14: ptx::ldmatrix_x4(r, shared + lane * 128); break;
    case 15: ptx::ldmatrix_x4(r, shared + lane * 128 + (lane % 8) * 16); break;
    case 16: ptx::store_shared<uint16_t>(shared + lane * 2, uint16_t{1}); break;
    case 17: ptx::copy_async_16(shared + lane * 128, in, true); break;
    case 18:  // each word once, but for the last sector
      for (int i = 0; i < 4; ++i) {
        if (i < 3 || lane < 24) ptx::load_global<uint32_t>(in + i * 128 + lane * 4);
      }
      ptx::load_global<uint32_t>(in + lane % 8 * 4);
      break;
    case 19:  // calls after a meeting belong together, whatever was masked before
      for (int i = 0; i < 2; ++i) {
        if (i == 1 || lane % 2 == 0) ptx::load_global<uint32_t>(in + i * 128 + lane * 4);
        ptx::sync_warp();
      }
      break;
  }
}

// What the emulator costs: a barrier of a warp after another.
QK_KERNEL void speed_kernel(Arguments arguments) {
  for (int64_t i = 0; i < arguments.n; ++i) ptx::sync_warp();
}

QK_KERNEL void mma_speed_kernel(Arguments arguments) {
  float c[4] = {};
  const uint32_t a[4] = {threadIdx.x, 1, 2, 3};
  for (int64_t i = 0; i < arguments.n; ++i) ptx::mma_m16n8k16<Half>(c, a, 5, 6);
  ptx::store_global(arguments.out + threadIdx.x, c[0]);
}

// --- The command line

using Kernel = void (*)(Arguments);

struct Case {
  const char* name;
  Kernel kernel;
  bool early = false;
};

constexpr Case kCases[] = {
    {"neighbour", neighbour_kernel},
    {"warp_neighbour", warp_neighbour_kernel},
    {"copy", copy_kernel},
    {"changed_source", changed_source_kernel},
    {"barriers", barriers_kernel},
    {"order", order_kernel},
    {"deadlock", deadlock_kernel},
    {"early", early_kernel, true},
    {"address", address_kernel},
    {"mma_half", mma_kernel<Half>},
    {"mma_bfloat16", mma_kernel<Bfloat16>},
    {"mma_bytes", mma_bytes_kernel},
    {"transpose", transpose_kernel},
    {"arithmetic_half", arithmetic_kernel<Half>},
    {"arithmetic_bfloat16", arithmetic_kernel<Bfloat16>},
    {"singles", singles_kernel},
    {"integer", integer_kernel},
    {"shuffle", shuffle_kernel},
    {"pattern", pattern_kernel},
    {"speed", speed_kernel},
    {"mma_speed", mma_speed_kernel},
};

std::vector<unsigned char> read_file(const char* path) {
  std::vector<unsigned char> bytes;
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) return bytes;
  unsigned char buffer[4096];
  for (size_t got; (got = std::fread(buffer, 1, sizeof(buffer), file)) > 0;) {
    bytes.insert(bytes.end(), buffer, buffer + got);
  }
  std::fclose(file);
  return bytes;
}

// An array that AddressSanitizer knows the end of, aligned as a GPU's allocations are.
struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
std::unique_ptr<T, Free> buffer(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) std::abort();
  return std::unique_ptr<T, Free>(static_cast<T*>(memory));
}

// Reads `key=value`.
const char* option(int argc, char** argv, const char* key, const char* otherwise) {
  const size_t length = std::strlen(key);
  for (int i = 2; i < argc; ++i) {
    if (std::strncmp(argv[i], key, length) == 0 && argv[i][length] == '=') {
      return argv[i] + length + 1;
    }
  }
  return otherwise;
}

int run(int argc, char** argv) {
  const auto text = [&](const char* key, const char* otherwise) {
    return option(argc, argv, key, otherwise);
  };
  const auto number = [&](const char* key, const char* otherwise) {
    return std::atoll(text(key, otherwise));
  };
  Kernel kernel = nullptr;
  bool early = false;
  for (const Case& one : kCases) {
    if (argc <= 1 || std::string(argv[1]) != one.name) continue;
    kernel = one.kernel;
    early = one.early;
  }
  for (const Probe& one : probes()) {
    if (argc > 1 && std::string(argv[1]) == one.name) kernel = one.kernel;
  }
  if (kernel == nullptr) return 2;

  const char* path = text("in", "");
  std::vector<unsigned char> bytes = read_file(path);
  if (bytes.empty()) {
    for (int i = 0; i < 4096; ++i) bytes.push_back(static_cast<unsigned char>(i));
  }
  const auto in = buffer<unsigned char>(bytes.size());
  std::memcpy(in.get(), bytes.data(), bytes.size());
  const auto words = static_cast<size_t>(number("words", "64"));
  const auto out = buffer<uint32_t>(words * 4);

  const std::string region_bytes = text("region", "");
  const char* kind = text("disable", nullptr);
  const char* file = text("file", "emulator_selftest.cu");
  const auto launches = number("launches", "1");
  for (long long i = 0; i < launches; ++i) {
    std::memset(out.get(), 0, words * 4);
    qkernels_emulator_reset();
    qkernels_emulator_set_seed(static_cast<uint64_t>(number("seed", "1") + i));
    if (!region_bytes.empty()) {
      qkernels_emulator_register_region("in", in.get(), std::stoul(region_bytes));
      qkernels_emulator_register_region("out", out.get(), words * 4);
    }
    qkernels_emulator_require_regions(static_cast<int>(number("require", "0")));
    qkernels_emulator_check_races(static_cast<int>(number("races", "0")));
    if (kind != nullptr) {
      qkernels_emulator_disable_site(kind, file, static_cast<int>(number("line", "0")));
    }
    // Switches that hold for one launch of several.
    qkernels_emulator_skip_launches(number("skip", "-1") == i ? 1 : 0);
    qkernels_emulator_run_last_blocks(number("last", "-1") == i ? 1 : 0);
    qkernels_emulator_fail_launches(file, number("fail", "-1") == i ? "no such kernel" : nullptr);
    const auto start = std::chrono::steady_clock::now();
    const auto start_kernel = [early](auto... arguments) {
      return early ? launch_early(arguments...) : launch(arguments...);
    };
    const char* error = start_kernel(
        kernel, dim3(static_cast<unsigned>(number("blocks", "1"))),
        static_cast<int>(number("threads", "32")), static_cast<int>(number("shared", "512")),
        nullptr,
        Arguments{in.get(), out.get(), number("n", "0"), static_cast<int>(number("mode", "0"))});
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("{\"error\": \"%s\", \"seconds\": %f, \"out\": [", error == nullptr ? "" : error,
                seconds.count());
    for (size_t w = 0; w < words; ++w) std::printf("%s%u", w == 0 ? "" : ", ", out.get()[w]);
    std::printf("], \"counters\": %s, \"sites\": %s}\n", qkernels_emulator_counters_json(),
                qkernels_emulator_sites_json());
  }
  return 0;
}

}  // namespace
}  // namespace qkernels

int main(int argc, char** argv) { return qkernels::run(argc, argv); }
