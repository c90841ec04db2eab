// Arithmetic on registers and reads that do nothing else: the ceilings that a benchmark compares
// with. Each returns how many operations it did, or bytes it read.

#pragma once

#include "cpu/kernels.h"

namespace qkernels::cpu {

// Keeps the compiler from leaving out what makes `value`.
template <class Value>
QK_INLINE void keep(const Value& value) {
  asm volatile("" ::"m"(value) : "memory");
}

template <class V>
int64_t fp32_burst(int64_t repeats) {
  typename V::F sums[V::kBurstSums];
  for (auto& sum : sums) sum = V::broadcast(1.0f);
  const auto factor = V::broadcast(0.999f), term = V::broadcast(0.001f);
  for (int64_t i = 0; i < repeats; ++i) {
    QK_UNROLL for (int s = 0; s < V::kBurstSums; ++s) sums[s] = V::fma(sums[s], factor, term);
  }
  keep(sums);
  return repeats * V::kBurstSums * kLanes * 2;
}

template <class V>
int64_t int8_burst(int64_t repeats) {
  typename V::I sums[V::kBurstSums];
  for (auto& sum : sums) sum = V::broadcast(int32_t{0});
  const auto codes = V::broadcast(int32_t{0x01020304}), x = V::broadcast(int32_t{0x05fb07f9});
  for (int64_t i = 0; i < repeats; ++i) {
    QK_UNROLL for (int s = 0; s < V::kBurstSums; ++s) {
      sums[s] = V::template dot<true>(sums[s], codes, x);
    }
  }
  keep(sums);
  return repeats * V::kBurstSums * kLanes * 4 * 2;
}

template <class V>
int64_t read_burst(const void* memory, int64_t bytes) {
  const auto* from = static_cast<const int32_t*>(memory);
  typename V::I sums[4];
  for (auto& sum : sums) sum = V::broadcast(int32_t{0});
  const int64_t lines = bytes / 64;
  for (int64_t line = 0; line + 4 <= lines; line += 4) {
    QK_UNROLL for (int s = 0; s < 4; ++s) {
      const int32_t* at = from + (line + s) * kLanes;
      QK_PREFETCH(at + kPrefetchWords);
      sums[s] = V::add(sums[s], V::load(at));
    }
  }
  keep(sums);
  return lines / 4 * 256;
}

}  // namespace qkernels::cpu
