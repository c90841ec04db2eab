// Contents of buffers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "numbers.h"

namespace cases {

using qkernels::cpu::FloatType;

constexpr FloatType kFloatTypes[] = {FloatType::kFp16, FloatType::kBf16, FloatType::kFp32};
constexpr const char* kFloatNames[] = {"fp16", "bf16", "fp32"};

constexpr const char* name_of(FloatType type) { return kFloatNames[static_cast<int>(type)]; }

// Exactly as long as what they hold, so that AddressSanitizer knows of the first byte beyond.
using Bytes = std::vector<uint8_t>;

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t below(int64_t end) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end));
  }
  float between(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_()) / 4294967296.0f;
  }
  std::vector<float> floats(int64_t count, float low, float high) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& each : out) each = between(low, high);
    return out;
  }
  Bytes bytes(int64_t count, int64_t low, int64_t end) {
    Bytes out(static_cast<size_t>(count));
    for (uint8_t& each : out) each = static_cast<uint8_t>(low + below(end - low));
    return out;
  }
  Bytes numbers(int64_t count, FloatType type, float low, float high) {
    Bytes out(static_cast<size_t>(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i) truth::store_at(out.data(), type, i, between(low, high));
    return out;
  }

 private:
  std::mt19937 engine_;
};

// As an output is before a kernel writes it: NaN in each type.
inline Bytes unwritten(int64_t count, int64_t size) {
  return Bytes(static_cast<size_t>(std::max<int64_t>(count, 0) * size), 0xff);
}

template <class T>
const T* or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

}  // namespace cases
