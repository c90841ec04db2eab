// Many rows of x on the tiles of AMX. Weights are decoded into tiles a chunk of columns at a time,
// which all rows then use; x comes in the order of tiles.
//
// A tile of sums is 16 rows of x by a panel. Two by two of them share their loads.

#include <cmath>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

QK_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16,amx-int8")

#include "cpu/vector_avx512.h"
#include "cpu/vector_kernels.h"

namespace qkernels::cpu {
namespace {

using V = Avx512;
using F = V::F;
using I = V::I;

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kFloatStep = 32, kInt8Step = 64;  // columns of a tile
constexpr int kMostTerms = 3;

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
    // gcc 12's _tile_loadconfig reads 8 of these bytes, and the stores of the others vanish.
    asm volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const char(*)[64]>(config)) : "memory");
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Columns that lie in one group and one chunk.
struct Span {
  int64_t first, last, group;
};

// Columns decoded at a time: whole groups where they are small.
constexpr int64_t kChunk = 512, kMostSpans = kChunk / 16;

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

// What is worked on at a time: a chunk of columns of two panels, or of the last one.
struct Place {
  int64_t panel, first, last;
};

// `visit(place, next)` for all places, `next` null at the end. With `along_k` a pair of panels is
// finished before the next is begun, so that weights stream; else a chunk of x is used by all.
template <class Visit>
void visit_places(const Weight& weight, int64_t begin, int64_t end, int64_t length, bool along_k,
                  const Visit& visit) {
  Place place{begin, 0, chunk_end(weight, 0, length)};
  for (bool more = true; more;) {
    Place next = place;
    if (along_k && place.last < weight.columns()) {
      next.first = place.last;
    } else if (place.panel + 2 < end) {
      next.panel += 2;
      next.first = along_k ? 0 : place.first;
    } else {
      next.panel = begin;
      next.first = along_k ? weight.columns() : place.last;
    }
    more = next.first < weight.columns();
    if (more) next.last = chunk_end(weight, next.first, length);
    visit(place, more ? &next : nullptr);
    place = next;
  }
}

// Whether x is small enough to stay in the L2 cache next to all else.
bool stays_cached(int64_t bytes_of_x) { return bytes_of_x <= 1 << 20; }

// Asks for the weights of the next place while tiles multiply, which alone read no memory.
class Prefetch {
 public:
  Prefetch(const Weight& weight, const Place* next, int64_t end) {
    if (next == nullptr) return;
    const int64_t step = weight.step_columns();
    for (int64_t p = 0; p < 2 && next->panel + p < end; ++p) {
      const uint32_t* words = weight.words + (next->panel + p) * weight.panel_words();
      at_[p] = reinterpret_cast<const char*>(words + next->first / step * kLanes);
      end_[p] = reinterpret_cast<const char*>(words + next->last / step * kLanes);
    }
  }

  // The next `lines` lines of each panel.
  QK_INLINE void ask(int lines) {
    for (int p = 0; p < 2; ++p) {
      for (int i = 0; i < lines && at_[p] < end_[p]; ++i, at_[p] += 64) QK_PREFETCH(at_[p]);
    }
  }

 private:
  const char* at_[2] = {};
  const char* end_[2] = {};
};

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
      }
    }
  }

  QK_INLINE void write(const Output& out, int64_t at, int64_t p, F value) const {
    if (out.bias != nullptr) value = V::add(value, bias[p]);
    store_first<V>(out.y, out.y_type, at, count[p], value);
  }
};

// --- Floats

// 16 numbers as bf16 in every code's place; twice, since a lookup takes five bits.
struct Bf16Table {
  I words[kMostTerms];
  int terms;  // whose sum is a number of the table
};

Bf16Table bf16_table(const Table4<V>& decoder, int most_terms) {
  alignas(64) float rest[16];
  V::store(rest, decoder.table);
  Bf16Table table{};
  alignas(64) uint16_t words[32];
  do {
    bool exact = true;
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, &rest[i], 4);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
      float value;
      __builtin_memcpy(&value, &rounded, 4);
      words[i] = words[i + 16] = static_cast<uint16_t>(rounded >> 16);
      rest[i] -= value;
      exact = exact && rest[i] == 0;
    }
    table.words[table.terms++] = _mm512_load_si512(words);
    if (exact) break;
  } while (table.terms < most_terms);
  return table;
}

// Two vectors of floats that are exact in bf16, as pairs.
QK_INLINE I pair(F even, F odd) {
  const I low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  const I mask = _mm512_set1_epi32(int32_t(0xffff0000));
  return _mm512_or_si512(low, _mm512_and_si512(_mm512_castps_si512(odd), mask));
}

// Columns [first, last) of a panel into tiles; `terms` apart by `term_bytes`.
template <class Decoder>
void decode_floats(const Weight& weight, const Decoder& decoder, const Bf16Table&, int64_t panel,
                   int64_t first, int64_t last, char* out, int64_t) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + first / 4 * kLanes;
  for (int64_t k = first; k < last; k += 4, from += kLanes, out += 128) {
    const I words = V::load(from);
    _mm512_store_si512(out, pair(decoder.template value<0>(words), decoder.template value<1>(words)));
    _mm512_store_si512(out + 64,
                       pair(decoder.template value<2>(words), decoder.template value<3>(words)));
  }
}

template <>
void decode_floats(const Weight& weight, const Table4<V>&, const Bf16Table& table, int64_t panel,
                   int64_t first, int64_t last, char* out, int64_t term_bytes) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + first / 8 * kLanes;
  for (int64_t k = first; k < last; k += 8, from += kLanes, out += 256) {
    const I words = V::load(from);
    for (int term = 0; term < table.terms; ++term) {
      char* to = out + term * term_bytes;
      const I values = table.words[term];
      // In the order 0 2 4 6 1 3 5 7, as `pack_float_tile` has it.
      _mm512_store_si512(to, _mm512_permutexvar_epi16(words, values));
      _mm512_store_si512(to + 64, _mm512_permutexvar_epi16(V::right<4>(words), values));
      _mm512_store_si512(to + 128, _mm512_permutexvar_epi16(V::right<8>(words), values));
      _mm512_store_si512(to + 192, _mm512_permutexvar_epi16(V::right<12>(words), values));
    }
  }
}

// What float_tiles keeps on its thread.
struct FloatScratch {
  char tiles[kMostTerms][2][kChunk / kFloatStep][kTileBytes];
  float product[2][2][kTileRows][kLanes];
  float scales[kMostSpans][2][kLanes];
  float zeros[kMostSpans][2][kLanes];
  // Then the sums: fp32 [pairs of panels][m in tiles][32].
};

// What two slots multiply at once: two tiles of rows with the same weights, or one tile of rows in
// two spans of the same length. One alone would wait for its own last sum.
struct FloatSlot {
  const uint16_t* x;  // at the span's first step
  int64_t step;       // of the chunk
};

template <int kSlots, bool kSameWeights, int kPanels>
QK_INLINE void multiply_floats(const FloatTileJob& job, const FloatScratch& scratch,
                               const Bf16Table& table, const FloatSlot (&slots)[2], int64_t steps,
                               Prefetch& prefetch, int lines, float* product) {
  zero_tiles<kSlots, kPanels>();
  constexpr int64_t kTileWords = kTileBytes / 2;
  const int most_terms = job.terms > table.terms ? job.terms : table.terms;
  for (int64_t step = 0; step < steps; ++step) {
    prefetch.ask(lines);
    for (int w = 0; w < table.terms; ++w) {
      const auto& tiles = scratch.tiles[w];
      // Products of small terms are below what is kept of large ones.
      for (int t = 0; t < job.terms && t + w < most_terms; ++t) {
        const int64_t at = (step * job.terms + t) * kTileWords;
        if (t == 0 || !kSameWeights) {
          _tile_loadd(6, tiles[0][slots[0].step + step], 64);
          if constexpr (kPanels == 2) _tile_loadd(7, tiles[1][slots[0].step + step], 64);
        }
        _tile_loadd(4, slots[0].x + at, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kPanels == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (kSlots == 2) {
          if constexpr (!kSameWeights) {
            _tile_loadd(6, tiles[0][slots[1].step + step], 64);
            if constexpr (kPanels == 2) _tile_loadd(7, tiles[1][slots[1].step + step], 64);
          }
          _tile_loadd(5, slots[1].x + at, 64);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (kPanels == 2) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
  }
  constexpr int64_t kTile = kTileRows * kLanes;
  _tile_stored(0, product, 64);
  if constexpr (kPanels == 2) _tile_stored(1, product + kTile, 64);
  if constexpr (kSlots == 2) _tile_stored(2, product + 2 * kTile, 64);
  if constexpr (kSlots == 2 && kPanels == 2) _tile_stored(3, product + 3 * kTile, 64);
}

// sums += scale * (product - zero * x_sum) for `rows` rows of one tile.
QK_INLINE void add_group(const float* product, float* sums, int64_t rows, F scale, F zero,
                         const float* x_sums, int64_t groups) {
  for (int64_t r = 0; r < rows; ++r) {
    F part = V::load(product + r * kLanes);
    if (x_sums != nullptr) part = V::fnma(zero, V::broadcast(x_sums[r * groups]), part);
    V::store(sums + r * 2 * kLanes, V::fma(scale, part, V::load(sums + r * 2 * kLanes)));
  }
}

// A chunk's spans and what goes with them.
struct FloatChunk {
  const FloatTileJob& job;
  FloatScratch& scratch;
  const Bf16Table& table;
  bool zeros;
  int64_t first;  // column
  Span spans[kMostSpans];
  int64_t span_count;

  FloatSlot slot(int64_t row_tile, int64_t span) const {
    const int64_t steps = job.weight.columns() / kFloatStep;
    const int64_t step = spans[span].first / kFloatStep;
    return {job.x + (row_tile * steps + step) * job.terms * (kTileBytes / 2),
            step - first / kFloatStep};
  }
  int64_t steps(int64_t span) const { return (spans[span].last - spans[span].first) / kFloatStep; }

  template <int kPanels>
  QK_INLINE void add(int64_t row_tile, int64_t s, const float* product, float* sums) const {
    const int64_t groups = job.weight.groups(), row = row_tile * kTileRows;
    const int64_t rows = job.m - row < kTileRows ? job.m - row : kTileRows;
    // A group that several spans share gives up its zero points once.
    const bool begins = spans[s].first == spans[s].group * job.weight.group;
    const float* x_sums = zeros && begins ? job.x_sums + row * groups + spans[s].group : nullptr;
    for (int p = 0; p < kPanels; ++p) {
      add_group(product + p * kTileRows * kLanes, sums + row * 2 * kLanes + p * kLanes, rows,
                V::load(scratch.scales[s][p]), V::load(scratch.zeros[s][p]), x_sums, groups);
    }
  }

  template <int kPanels>
  void run(Prefetch& prefetch, float* sums) const {
    constexpr int64_t kSlot = 2 * kTileRows * kLanes;
    constexpr int kLines = 4;  // of a step of 4 bits
    const int64_t row_tiles = divide_up(job.m, kTileRows);
    float* product = scratch.product[0][0][0];
    int64_t tile = 0;
    for (; tile + 2 <= row_tiles; tile += 2) {
      for (int64_t s = 0; s < span_count; ++s) {
        multiply_floats<2, true, kPanels>(job, scratch, table, {slot(tile, s), slot(tile + 1, s)},
                                          steps(s), prefetch, kLines, product);
        add<kPanels>(tile, s, product, sums);
        add<kPanels>(tile + 1, s, product + kSlot, sums);
      }
    }
    if (tile == row_tiles) return;
    for (int64_t s = 0; s < span_count;) {
      if (s + 1 < span_count && steps(s) == steps(s + 1)) {
        multiply_floats<2, false, kPanels>(job, scratch, table, {slot(tile, s), slot(tile, s + 1)},
                                           steps(s), prefetch, 2 * kLines, product);
        add<kPanels>(tile, s, product, sums);
        add<kPanels>(tile, s + 1, product + kSlot, sums);
        s += 2;
      } else {
        multiply_floats<1, true, kPanels>(job, scratch, table, {slot(tile, s), {}}, steps(s),
                                          prefetch, kLines, product);
        add<kPanels>(tile, s, product, sums);
        s += 1;
      }
    }
  }
};

template <class Decoder>
void float_panels_on_tiles(const FloatTileJob& job, const Decoder& decoder, int64_t begin,
                           int64_t end, FloatScratch& scratch) {
  const Weight& weight = job.weight;
  const int64_t padded_rows = divide_up(job.m, kTileRows) * kTileRows;
  auto* all_sums = reinterpret_cast<float*>(&scratch + 1);
  const int64_t pairs = divide_up(end - begin, 2), pair_sums = padded_rows * 2 * kLanes;
  __builtin_memset(all_sums, 0, static_cast<size_t>(pairs * pair_sums) * sizeof(float));
  Bf16Table table{};
  table.terms = 1;
  if constexpr (std::is_same_v<Decoder, Table4<V>>) table = bf16_table(decoder, job.table_terms);
  FloatChunk chunk{job, scratch, table, has_zeros(weight, decoder.offset), 0, {}, 0};
  const bool along_k = stays_cached(padded_rows * weight.columns() * job.terms * 2);
  const TileRegisters registers(job.m < kTileRows ? job.m : kTileRows);
  visit_places(weight, begin, end, kChunk, along_k, [&](const Place& place, const Place* next) {
    chunk.first = place.first;
    chunk.span_count = spans_of(weight, place.first, place.last, chunk.spans);
    const int64_t panels = end - place.panel < 2 ? 1 : 2;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t panel = place.panel + p;
      decode_floats(weight, decoder, table, panel, place.first, place.last, scratch.tiles[0][p][0],
                    sizeof scratch.tiles[0]);
      for (int64_t s = 0; s < chunk.span_count; ++s) {
        const int64_t g = chunk.spans[s].group;
        V::store(scratch.scales[s][p], group_scales<V>(weight, panel, g));
        V::store(scratch.zeros[s][p], group_zeros<V>(weight, panel, g, decoder.offset));
      }
    }
    Prefetch prefetch(weight, next, end);
    float* sums = all_sums + (place.panel - begin) / 2 * pair_sums;
    if (panels == 2) chunk.run<2>(prefetch, sums);
    else chunk.run<1>(prefetch, sums);
  });
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = end - panel < 2 ? 1 : 2;
    const OutputColumns columns(job.out, weight, panel, panels);
    const float* sums = all_sums + (panel - begin) / 2 * pair_sums;
    for (int64_t row = 0; row < job.m; ++row, sums += 2 * kLanes) {
      for (int64_t p = 0; p < panels; ++p) {
        F sum = V::load(sums + p * kLanes);
        if (job.out.row_scales != nullptr) {
          sum = V::mul(V::broadcast(job.out.row_scales[row]), sum);
        }
        columns.write(job.out, row * weight.n + (panel + p) * kLanes, p, sum);
      }
    }
  }
}

void float_tiles(const FloatTileJob& job, int64_t begin, int64_t end, void* scratch) {
  visit_decoder<V>(job.weight, [&](const auto& decoder) {
    float_panels_on_tiles(job, decoder, begin, end, *static_cast<FloatScratch*>(scratch));
  });
}

void pack_float_tile(const void* x, FloatType type, int64_t x_stride, int64_t row, int64_t m,
                     int64_t k, const Weight& weight, int terms, uint16_t* out) {
  const int64_t columns = weight.columns();
  const I order = _mm512_broadcast_i32x4(
      is_nibble(weight.code) ? _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
                             : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t r = 0; r < kTileRows; ++r) {
    uint16_t* to = out + r * kFloatStep;
    const int64_t at = (row + r) * x_stride;
    for (int64_t c = 0; c < columns; c += kFloatStep) {
      const bool inside = row + r < m;
      if (inside && terms == 1 && type == FloatType::kBf16 && c + kFloatStep <= k) {
        const I words = _mm512_loadu_si512(static_cast<const uint16_t*>(x) + at + c);
        _mm512_store_si512(to, _mm512_shuffle_epi8(words, order));
        to += kTileBytes / 2;
        continue;
      }
      F half[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t column = c + i * kLanes;
        half[i] = inside && column < k ? load_first<V>(x, type, at + column, k - column)
                                       : V::broadcast(0.0f);
      }
      for (int t = 0; t < terms; ++t, to += kTileBytes / 2) {
        __m256i words[2];
        for (int i = 0; i < 2; ++i) {
          const I rounded = V::round_to_bf16(half[i]);
          words[i] = _mm512_cvtepi32_epi16(rounded);
          half[i] = V::sub(half[i], V::from_bits(V::left<16>(rounded)));
        }
        const I both = _mm512_inserti64x4(_mm512_castsi256_si512(words[0]), words[1], 1);
        _mm512_store_si512(to, _mm512_shuffle_epi8(both, order));
      }
    }
  }
}

// --- Integers

constexpr int64_t kInt8Chunk = 512;

struct Int8Scratch {
  char tiles[2][kInt8Chunk / kInt8Step][kTileBytes];
  int32_t product[2][2][kTileRows][kLanes];
  // Then the sums: int32 or fp32 [pairs of panels][m in tiles][32], and int32 [m]: of x.
};

// Codes of up to 4 bits as bytes, in tiles. With two-level scales, a byte is
// multiplier * (code - zero) + 128.
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
    const int64_t at = (panel * weight.groups() + g) * kLanes;
    const I multiplier = V::load_bytes(static_cast<const uint8_t*>(weight.scales) + at);
    // All four bytes of a lane at once: what one borrows of the next, the sum of all gives back,
    // since each byte of the result is within 0 and 255.
    const I zero = V::mul(group_integer_zeros<V>(weight, panel, g), multiplier);
    const I offset = V::sub(V::broadcast(int32_t(0x80808080)),
                            V::mul(zero, V::broadcast(int32_t{0x01010101})));
    for (; first < end; first += 8, from += kLanes, out += 128) {
      const I words = V::load(from);
      _mm512_store_si512(out, V::add(V::mul(V::and_(words, low), multiplier), offset));
      _mm512_store_si512(out + 64,
                         V::add(V::mul(V::and_(V::right<4>(words), low), multiplier), offset));
    }
  }
}

// Adds the steps of [first, last) to the tiles of sums.
template <int kRowTiles, int kPanels>
QK_INLINE void multiply_bytes(const Int8TileJob& job, const char* w0, const char* w1,
                              int64_t row_tile, int64_t first, int64_t last,
                              Prefetch& prefetch) {
  const int64_t steps = job.weight.columns() / kInt8Step;
  const int lines = is_nibble(job.weight.code) ? 8 : 16;
  const int8_t* x0 = job.x + (row_tile * steps + first / kInt8Step) * kTileBytes;
  const int8_t* x1 = x0 + steps * kTileBytes;
  const int64_t bytes = (last - first) / kInt8Step * kTileBytes;
  for (int64_t at = 0; at < bytes; at += kTileBytes) {
    prefetch.ask(lines);
    _tile_loadd(6, w0 + at, 64);
    if constexpr (kPanels == 2) _tile_loadd(7, w1 + at, 64);
    _tile_loadd(4, x0 + at, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kPanels == 2) _tile_dpbsud(1, 4, 7);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, x1 + at, 64);
      _tile_dpbsud(2, 5, 6);
      if constexpr (kPanels == 2) _tile_dpbsud(3, 5, 7);
    }
  }
}

template <int kRowTiles, int kPanels>
QK_INLINE void store_tiles(int32_t* out, int64_t tile_stride, int64_t panel_stride,
                           int64_t row_bytes) {
  _tile_stored(0, out, row_bytes);
  if constexpr (kPanels == 2) _tile_stored(1, out + panel_stride, row_bytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, out + tile_stride, row_bytes);
  if constexpr (kRowTiles == 2 && kPanels == 2) {
    _tile_stored(3, out + tile_stride + panel_stride, row_bytes);
  }
}

// One pair of panels, some rows and a chunk [first, last), into integer sums.
template <int kRowTiles, int kPanels>
void add_integers(const Int8TileJob& job, const char* w0, const char* w1, int64_t row_tile,
                  int64_t first, int64_t last, Prefetch& prefetch, int32_t* sums) {
  constexpr int64_t kRow = 2 * kLanes, kTile = kTileRows * kRow;
  int32_t* out = sums + row_tile * kTile;
  if (first == 0) {
    zero_tiles<kRowTiles, kPanels>();
  } else {
    _tile_loadd(0, out, kRow * 4);
    if constexpr (kPanels == 2) _tile_loadd(1, out + kLanes, kRow * 4);
    if constexpr (kRowTiles == 2) _tile_loadd(2, out + kTile, kRow * 4);
    if constexpr (kRowTiles == 2 && kPanels == 2) _tile_loadd(3, out + kTile + kLanes, kRow * 4);
  }
  multiply_bytes<kRowTiles, kPanels>(job, w0, w1, row_tile, first, last, prefetch);
  store_tiles<kRowTiles, kPanels>(out, kTile, kLanes, kRow * 4);
}

// The same where each group has a floating scale: fp32 sums, in the order of groups.
template <int kRowTiles, int kPanels>
void add_scaled(const Int8TileJob& job, Int8Scratch& scratch, const char* w0, const char* w1,
                int64_t row_tile, int64_t panel, int64_t first, int64_t last, Prefetch& prefetch,
                float* sums) {
  const Weight& weight = job.weight;
  while (first < last) {
    const int64_t g = first / weight.group;
    const int64_t end = weight.group_end(g) < last ? weight.group_end(g) : last;
    zero_tiles<kRowTiles, kPanels>();
    multiply_bytes<kRowTiles, kPanels>(job, w0, w1, row_tile, first, end, prefetch);
    int32_t* product = scratch.product[0][0][0];
    constexpr int64_t kTile = kTileRows * kLanes;
    store_tiles<kRowTiles, kPanels>(product, 2 * kTile, kTile, 64);
    for (int p = 0; p < kPanels; ++p) {
      const F scale = group_scales<V>(weight, panel + p, g);
      const I zero = group_integer_zeros<V>(weight, panel + p, g);
      for (int i = 0; i < kRowTiles; ++i) {
        const int64_t row = (row_tile + i) * kTileRows;
        const int64_t rows = job.m - row < kTileRows ? job.m - row : kTileRows;
        const int32_t* from = product + (2 * i + p) * kTile;
        const int32_t* x_sums = job.x_sums + row * weight.groups() + g;
        float* to = sums + row * 2 * kLanes + p * kLanes;
        for (int64_t r = 0; r < rows; ++r) {
          const I x_sum = V::broadcast(x_sums[r * weight.groups()]);
          const I part = V::sub(V::load(from + r * kLanes), V::mul(zero, x_sum));
          const F old = V::load(to + r * 2 * kLanes);
          V::store(to + r * 2 * kLanes, V::add(old, V::mul(scale, V::to_float(part))));
        }
      }
    }
    w0 += (end - first) / kInt8Step * kTileBytes;
    w1 += (end - first) / kInt8Step * kTileBytes;
    first = end;
  }
}

template <int kPanels>
void add_int8_chunk(const Int8TileJob& job, Int8Scratch& scratch, const char* w0, const char* w1,
                    int64_t panel, int64_t first, int64_t last, Prefetch& prefetch, void* sums) {
  const int64_t row_tiles = divide_up(job.m, kTileRows);
  const bool integers = job.weight.sums_are_integers();
  auto* whole = static_cast<int32_t*>(sums);
  auto* real = static_cast<float*>(sums);
  int64_t tile = 0;
  for (; tile + 2 <= row_tiles; tile += 2) {
    if (integers) add_integers<2, kPanels>(job, w0, w1, tile, first, last, prefetch, whole);
    else add_scaled<2, kPanels>(job, scratch, w0, w1, tile, panel, first, last, prefetch, real);
  }
  if (tile < row_tiles) {
    if (integers) add_integers<1, kPanels>(job, w0, w1, tile, first, last, prefetch, whole);
    else add_scaled<1, kPanels>(job, scratch, w0, w1, tile, panel, first, last, prefetch, real);
  }
}

void int8_tiles(const Int8TileJob& job, int64_t begin, int64_t end, void* memory) {
  auto& scratch = *static_cast<Int8Scratch*>(memory);
  const Weight& weight = job.weight;
  const bool nibbles = is_nibble(weight.code), integers = weight.sums_are_integers();
  const int64_t padded_rows = divide_up(job.m, kTileRows) * kTileRows;
  const int64_t pairs = divide_up(end - begin, 2), pair_sums = padded_rows * 2 * kLanes;
  auto* all_sums = reinterpret_cast<int32_t*>(&scratch + 1);
  int32_t* x_totals = all_sums + pairs * pair_sums;
  if (!integers) __builtin_memset(all_sums, 0, static_cast<size_t>(pairs * pair_sums) * 4);
  for (int64_t row = 0; integers && row < job.m; ++row) {
    int32_t total = 0;
    for (int64_t g = 0; g < weight.groups(); ++g) total += job.x_sums[row * weight.groups() + g];
    x_totals[row] = total;
  }
  const bool along_k = stays_cached(padded_rows * weight.columns());
  const TileRegisters registers(job.m < kTileRows ? job.m : kTileRows);
  visit_places(weight, begin, end, kInt8Chunk, along_k, [&](const Place& place, const Place* next) {
    const int64_t panels = end - place.panel < 2 ? 1 : 2;
    const char* tiles[2] = {};
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t panel = place.panel + p;
      if (nibbles) {
        tiles[p] = scratch.tiles[p][0];
        decode_bytes(weight, panel, place.first, place.last, scratch.tiles[p][0]);
      } else {
        // Steps of 8-bit codes are tiles as they lie.
        tiles[p] = reinterpret_cast<const char*>(weight.words + panel * weight.panel_words() +
                                                 place.first / 4 * kLanes);
      }
    }
    Prefetch prefetch(weight, next, end);
    const auto add = panels == 2 ? add_int8_chunk<2> : add_int8_chunk<1>;
    add(job, scratch, tiles[0], tiles[1], place.panel, place.first, place.last, prefetch,
        all_sums + (place.panel - begin) / 2 * pair_sums);
  });
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = end - panel < 2 ? 1 : 2;
    const OutputColumns columns(job.out, weight, panel, panels);
    F scales[2] = {};
    I zeros[2] = {};
    for (int64_t p = 0; integers && p < panels; ++p) {
      scales[p] = channel_scales<V>(weight, panel + p);
      // Decoded with two-level scales, the zero point is what keeps bytes unsigned.
      zeros[p] = weight.channel_scales != nullptr && nibbles
                     ? V::broadcast(int32_t{128})
                     : group_integer_zeros<V>(weight, panel + p, 0);
    }
    const int32_t* sums = all_sums + (panel - begin) / 2 * pair_sums;
    for (int64_t row = 0; row < job.m; ++row, sums += 2 * kLanes) {
      const F row_scale = V::broadcast(job.out.row_scales[row]);
      for (int64_t p = 0; p < panels; ++p) {
        F value = V::load(reinterpret_cast<const float*>(sums + p * kLanes));
        F scale = row_scale;
        if (integers) {
          const I correction = V::mul(zeros[p], V::broadcast(x_totals[row]));
          value = V::to_float(V::sub(V::load(sums + p * kLanes), correction));
          scale = V::mul(row_scale, scales[p]);
        }
        columns.write(job.out, row * weight.n + (panel + p) * kLanes, p, V::mul(scale, value));
      }
    }
  }
}

void pack_int8_row(const int8_t* x, int64_t columns, int8_t* out) {
  for (int64_t c = 0; c < columns; c += kInt8Step, out += kTileBytes) {
    _mm512_storeu_si512(out, _mm512_loadu_si512(x + c));
  }
}

int64_t tile_scratch(int64_t m, int64_t panels) {
  const int64_t padded_rows = divide_up(m, kTileRows) * kTileRows;
  const int64_t sums = divide_up(panels, 2) * padded_rows * 2 * kLanes * 4 + padded_rows * 4;
  const auto fixed = sizeof(FloatScratch) > sizeof(Int8Scratch) ? sizeof(FloatScratch)
                                                                : sizeof(Int8Scratch);
  return static_cast<int64_t>(fixed) + sums;
}

}  // namespace

Kernels amx_kernels() {
  Kernels table = vector_kernels<Avx512>();
  table.float_tiles = float_tiles;
  table.int8_tiles = int8_tiles;
  table.pack_float_tile = pack_float_tile;
  table.pack_int8_row = pack_int8_row;
  table.tile_scratch = tile_scratch;
  return table;
}

}  // namespace qkernels::cpu

QK_TARGET_END
#endif
