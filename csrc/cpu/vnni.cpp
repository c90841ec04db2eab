#include "cpu/vnni.h"

#include <algorithm>
#include <cstring>

#include "cpu/faults.h"
#include "cpu/weight.h"

namespace qkernels::cpu {

namespace {

// A step of one row: 8 codes of up to 4 bits, the upper four in the high halves, or 4 of 8 bits.
uint32_t join(uint64_t codes, bool nibbles) {
  const auto low = static_cast<uint32_t>(codes);
  return nibbles ? low | static_cast<uint32_t>(codes >> 32) << 4 : low;
}

uint64_t part(uint32_t word, bool nibbles) {
  if (!nibbles) return word;
  constexpr uint32_t kLow = 0x0f0f0f0f;
  return (word & kLow) | uint64_t{word >> 4 & kLow} << 32;
}

}  // namespace

void pack_vnni(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t k, bool nibbles,
               const Pool& pool) {
  const int64_t step = nibbles ? 8 : 4, steps = padded_columns(k) / step;
  parallel_for(pool, ceil_div(rows, kLanes), [&](int64_t panel) {
    uint32_t* to = words + panel * steps * kLanes;
    const int64_t here = std::min(kLanes, rows - panel * kLanes);
    if (here < kLanes) std::memset(to, 0, static_cast<size_t>(steps * kLanes) * 4);
    // Some steps at a time, so that the lines they are written to stay in the cache.
    constexpr int64_t kBlock = 64;
    for (int64_t first = 0; first < steps; first += kBlock) {
      for (int64_t r = 0; r < here; ++r) {
        const uint8_t* from = codes + (panel * kLanes + r) * k;
        for (int64_t s = first; s < std::min(steps, first + kBlock); ++s) {
          const int64_t left = std::clamp<int64_t>(k - s * step, 0, step);
          uint64_t some = 0;
          // A copy of a fixed size is one load.
          if (left == 8)
            std::memcpy(&some, from + s * step, 8);
          else if (left == 4)
            std::memcpy(&some, from + s * step, 4);
          else
            std::memcpy(&some, from + s * step, static_cast<size_t>(left));
          if (QK_FAULT(last_codes_not_packed) && left < step) some = 0;
          to[s * kLanes + r] = join(some, nibbles);
        }
      }
    }
  });
}

void unpack_vnni(const uint32_t* words, uint8_t* codes, int64_t first, int64_t rows, int64_t k,
                 bool nibbles, const Pool& pool) {
  const int64_t step = nibbles ? 8 : 4, steps = padded_columns(k) / step;
  parallel_for(pool, ceil_div(rows, kLanes), [&](int64_t block) {
    const int64_t last = std::min(rows, (block + 1) * kLanes);
    for (int64_t r = block * kLanes; r < last; ++r) {
      const int64_t row = (QK_FAULT(unpacked_from_first_row) ? 0 : first) + r;
      const uint32_t* from = words + row / kLanes * steps * kLanes + row % kLanes;
      uint8_t* to = codes + r * k;
      for (int64_t at = 0; at < k; at += step, from += kLanes) {
        const uint64_t some = part(*from, nibbles);
        if (k - at >= 8 && nibbles)
          std::memcpy(to + at, &some, 8);
        else if (k - at >= 4 && !nibbles)
          std::memcpy(to + at, &some, 4);
        else
          std::memcpy(to + at, &some, static_cast<size_t>(k - at));
      }
    }
  });
}

}  // namespace qkernels::cpu
