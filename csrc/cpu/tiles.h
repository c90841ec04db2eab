// What the kernels on AMX tiles share. Only for source files after QK_TARGET.

#pragma once

#include <immintrin.h>

#include "cpu/faults.h"
#include "cpu/groups.h"
#include "cpu/integer_weights.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {
namespace {

using V = Avx512;
using F = V::F;
using I = V::I;

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kFloatStep = 32, kInt8Step = 64;  // columns of a tile

// The registers of tiles on this thread, which other libraries set up as they like: 0 to 3 for sums
// and 4 and 5 for x, of `rows` rows; 6 and 7 for weights.
class TileRegisters {
 public:
  explicit TileRegisters(int64_t rows) {
    alignas(64) char config[64] = {};
    config[0] = 1;  // the palette
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;  // bytes of a row
      config[48 + tile] = static_cast<char>(tile < 6 ? rows : kTileRows);
    }
#ifdef QK_SOFTWARE_TILES
    _tile_loadconfig(config);  // of tests/csrc/software_tiles.h
#else
    // gcc 12's _tile_loadconfig reads 8 of these bytes, and the stores of the others vanish.
    asm volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const char (*)[64]>(config)) : "memory");
#endif
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Columns that lie in one group and one chunk.
struct Span {
  int64_t first, last, group;
};

// The end of the chunk that begins at column `first`: `length` columns, less so that it ends with a
// group where it holds whole ones, and where the group does.
int64_t chunk_end(const Weight& weight, int64_t first, int64_t length) {
  const int64_t columns = weight.columns();
  if (weight.groups() == 1) return first + length < columns ? first + length : columns;
  if (weight.group > length) {
    const int64_t group_end = weight.group_end(first / weight.group);
    return first + length < group_end ? first + length : group_end;
  }
  const int64_t last = first + length / weight.group * weight.group;
  // The last group takes the columns that pad K.
  return last / weight.group >= weight.groups() ? columns : last;
}

// The spans that columns [first, last) fall into, and how many.
int64_t spans_of(const Weight& weight, int64_t first, int64_t last, Span* spans) {
  int64_t count = 0;
  while (first < last) {
    const int64_t g = weight.groups() == 1 ? 0 : first / weight.group;
    const int64_t end = weight.group_end(g) < last ? weight.group_end(g) : last;
    spans[count++] = {first, end, g};
    first = end;
  }
  return count;
}

template <int kSlots, int kPanels>
QK_INLINE void zero_tiles() {
  _tile_zero(0);
  if constexpr (kPanels == 2) _tile_zero(1);
  if constexpr (kSlots == 2) _tile_zero(2);
  if constexpr (kSlots == 2 && kPanels == 2) _tile_zero(3);
}

// The tiles of sums, 1 KB each: of slot i and panel p at i * slot_bytes + p * panel_bytes.
template <int kSlots, int kPanels>
QK_INLINE void store_tiles(void* out, int64_t slot_bytes, int64_t panel_bytes) {
  char* const first = static_cast<char*>(out);
  _tile_stored(0, first, 64);
  if constexpr (kPanels == 2) _tile_stored(1, first + panel_bytes, 64);
  if constexpr (kSlots == 2) _tile_stored(2, first + slot_bytes, 64);
  if constexpr (kSlots == 2 && kPanels == 2) _tile_stored(3, first + slot_bytes + panel_bytes, 64);
}

// Whether x is small enough to stay in the L2 cache next to all else.
constexpr bool stays_cached(int64_t bytes_of_x) { return bytes_of_x <= 1 << 20; }

// Asks for weights while tiles multiply, which alone read no memory: of two panels in turn, since
// that keeps more of the memory busy than one after the other.
class Prefetch {
 public:
  // Columns [first, last) of panels [begin, end); nothing where that is empty.
  Prefetch(const Weight& weight, int64_t begin, int64_t end, int64_t first, int64_t last) {
    if (first >= last) return;
    length_ = weight.words_before(last - first) * 4;
    panels_ = end - begin;
    for (int64_t p = 0; p < panels_; ++p) {
      at_[p] = reinterpret_cast<const char*>(weight.words + (begin + p) * weight.panel_words() +
                                             weight.words_before(first));
      end_[p] = at_[p] + length_;
    }
  }

  // Lines of each panel to ask for at a time so as to be through after so many times.
  int lines(int64_t times) const {
    return static_cast<int>(ceil_div(length_ / 64, times > 0 ? times : 1));
  }

  QK_INLINE void ask(int lines) {
    for (int p = 0; p < 2; ++p) {
      const char* at = at_[p];
      const char* const stop = end_[p] - at < 64 * lines ? end_[p] : at + 64 * lines;
      for (; at < stop; at += 64) QK_PREFETCH_FAR(at);
      at_[p] = at;
    }
  }

 private:
  int64_t panels_ = 0, length_ = 0;
  const char *at_[2] = {}, *end_[2] = {};
};

// Of the chunk after `last`: of the same two panels, or of the next two.
inline Prefetch next_chunk(const Weight& weight, int64_t panel, int64_t end, int64_t last,
                           int64_t length) {
  const bool same = last < weight.columns();
  const int64_t next = same ? panel : panel + 2, first = same ? last : 0;
  const int64_t next_end = end - next < 2 ? end : next + 2;
  return {weight, next, next_end, first, next < end ? chunk_end(weight, first, length) : first};
}

// Codes of up to 4 bits as bytes, in tiles.
void decode_bytes(const Weight& weight, int64_t panel, int64_t first, int64_t last, char* out) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + first / 8 * kLanes;
  const I low = V::broadcast(int32_t{0x0f0f0f0f});
  while (first < last) {
    const int64_t g = weight.groups() == 1 ? 0 : first / weight.group;
    const int64_t end = weight.group_end(g) < last ? weight.group_end(g) : last;
    if (weight.channel_scales == nullptr) {
      for (; first < end; first += 8, from += kLanes, out += 128) {
        const I words = V::load(from);
        _mm512_store_si512(out, V::and_(words, low));
        _mm512_store_si512(out + 64, V::and_(V::right<4>(words), low));
      }
      continue;
    }
    const ByteDecoder<V> decoder(weight, panel, g);
    for (; first < end; first += 8, from += kLanes, out += 128) {
      const I words = V::load(from);
      _mm512_store_si512(out, decoder.bytes(words));
      _mm512_store_si512(out + 64, decoder.bytes(V::right<4>(words)));
    }
  }
}

// What the columns of two panels have in common in all rows of y.
struct OutputColumns {
  F bias[2] = {V::broadcast(0.0f), V::broadcast(0.0f)};
  int64_t count[2];

  OutputColumns(const Output& out, const Weight& weight, int64_t panel, int64_t panels) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t first = (panel + p) * kLanes;
      count[p] = weight.n - first < kLanes ? weight.n - first : kLanes;
      if (out.bias != nullptr) {
        bias[p] = load_first<V>(out.bias, out.bias_type, first, count[p]);
        if (QK_FAULT(tile_bias_of_first_panel)) bias[p] = bias[0];
      }
    }
  }

  // Element `at` of the output is the first of 16 of row `row`.
  QK_INLINE void write(const Output& out, int64_t row, int64_t at, int64_t p, F value) const {
    if (out.bias != nullptr) value = V::add(value, bias[p]);
    if (out.int8.values != nullptr) return write_int8<V>(out, row, at, count[p], value);
    if (out.y_type == FloatType::kBf16 && count[p] == kLanes) {
      const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out.y) + at), rounded);
      return;
    }
    store_first<V>(out.y, out.y_type, at, count[p], value);
  }
};

}  // namespace
}  // namespace qkernels::cpu
