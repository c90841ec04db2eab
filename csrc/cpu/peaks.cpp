#include "cpu/peaks.h"

#include <atomic>
#include <chrono>
#include <memory>

#include "cpu/kernels.h"

namespace qkernels::cpu {

namespace {

constexpr int64_t kRepeats = 20000;
constexpr int64_t kBufferBytes = int64_t{512} << 20;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What all threads together do in a second: the best of some rounds, since a shared machine gives
// less at times. `burst(thread, round)` returns how much it did.
template <class Burst>
double rate(double seconds, const Pool& pool, const Burst& burst) {
  double best = 0;
  const auto start = Clock::now();
  for (int64_t round = 0; round == 0 || seconds_since(start) < seconds; ++round) {
    std::atomic<int64_t> done{0};
    const auto began = Clock::now();
    parallel_for(pool, pool.threads, [&](int64_t thread) { done += burst(thread, round); });
    const double now = static_cast<double>(done.load()) / seconds_since(began);
    best = now > best ? now : best;
  }
  return best;
}

}  // namespace

Peaks measure_peaks(Isa isa, double seconds, const Pool& pool) {
  const Kernels& table = kernels(isa);
  const double each = seconds / 4;
  Peaks peaks{};
  peaks.fp32 = rate(each, pool, [&](int64_t, int64_t) { return table.fp32_burst(kRepeats); });
  peaks.int8 = rate(each, pool, [&](int64_t, int64_t) { return table.int8_burst(kRepeats); });
  if (table.bf16_burst != nullptr) {
    peaks.bf16 = rate(each, pool, [&](int64_t, int64_t) { return table.bf16_burst(kRepeats); });
  }
  // Written, or all pages would be the one of zeros, which a cache holds.
  const auto words = static_cast<size_t>(kBufferBytes / 4);
  const std::unique_ptr<int32_t[]> buffer(new int32_t[words]);
  for (size_t i = 0; i < words; ++i) buffer[i] = 1;
  const int64_t share = kBufferBytes / pool.threads / 64 * 64;
  peaks.read = rate(each, pool, [&](int64_t thread, int64_t) {
    return table.read_burst(buffer.get() + thread * share / 4, share);
  });
  return peaks;
}

}  // namespace qkernels::cpu
