// Products on AMX tiles whose sums are scaled group by group, outside of the tiles: of floats,
// where codes stay exact and x is the sum of several bf16 numbers; of int8, where each group has a
// floating scale. Rows are few enough for x to stay in the L2 cache.

#pragma once

#include <type_traits>

#include "cpu/decode.h"
#include "cpu/faults.h"
#include "cpu/tiles.h"
#include "cpu/zero_groups.h"

namespace qkernels::cpu {
namespace {

constexpr int kMostTerms = 3;
// Columns decoded at a time: whole groups where they are small.
constexpr int64_t kGroupedChunk = 256, kMostSpans = kGroupedChunk / 16;

// --- Floats

// 16 numbers as bf16 in every code's place; twice, since a lookup takes five bits.
struct Bf16Table {
  I words[kMostTerms];
  int terms;  // whose sum is a number of the table
};

Bf16Table bf16_table(const Table4<V>& decoder, int most_terms) {
  if (QK_FAULT(tile_table_in_one_term)) most_terms = 1;
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

// Columns [first, last) of a panel into tiles, the terms `term_bytes` apart.
template <class Decoder>
void decode_exactly(const Weight& weight, const Decoder& decoder, const Bf16Table&, int64_t panel,
                    int64_t first, int64_t last, char* out, int64_t, Prefetch& prefetch) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + first / 4 * kLanes;
  for (int64_t k = first; k < last; k += 4, from += kLanes, out += 128) {
    const I words = V::load(from);
    if (k % 16 == 0) prefetch.ask(1);
    _mm512_store_si512(out,
                       pair(decoder.template value<0>(words), decoder.template value<1>(words)));
    _mm512_store_si512(out + 64,
                       pair(decoder.template value<2>(words), decoder.template value<3>(words)));
  }
}

template <>
void decode_exactly(const Weight& weight, const Table4<V>&, const Bf16Table& table, int64_t panel,
                    int64_t first, int64_t last, char* out, int64_t term_bytes,
                    Prefetch& prefetch) {
  const uint32_t* from = weight.words + panel * weight.panel_words() + first / 8 * kLanes;
  for (int64_t k = first; k < last; k += 8, from += kLanes, out += 256) {
    const I words = V::load(from);
    // Half of what comes next; the rest is asked for while tiles multiply.
    if (k % 32 == 0) prefetch.ask(1);
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
  char tiles[kMostTerms][2][kGroupedChunk / kFloatStep][kTileBytes];
  float product[2][2][kTileRows][kLanes];  // of slots and panels
  float scales[kMostSpans][2][kLanes];
  float zeros[kMostSpans][2][kLanes];
  // Then the sums: fp32 [m in tiles][32].
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
  if (QK_FAULT(tile_last_step_missing)) --steps;
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
  store_tiles<kSlots, kPanels>(product, 2 * kTileBytes, kTileBytes);
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
    bool begins = spans[s].first == spans[s].group * job.weight.group;
    if (QK_FAULT(tile_zeros_of_each_span)) begins = true;
    const float* x_sums = zeros && begins ? job.x_sums + row * groups + spans[s].group : nullptr;
    for (int p = 0; p < kPanels; ++p) {
      add_group(product + p * kTileRows * kLanes, sums + row * 2 * kLanes + p * kLanes, rows,
                V::load(scratch.scales[s][p]), V::load(scratch.zeros[s][p]), x_sums, groups);
    }
  }

  // Two products at a time: those of two tiles of rows or, of one, of two spans.
  template <int kSlots, bool kSameWeights, int kPanels>
  QK_INLINE void multiply(int64_t tile, int64_t span, int64_t next_tile, int64_t next_span,
                          Prefetch& prefetch, int lines, float* sums) const {
    const FloatSlot slots[2] = {slot(tile, span), slot(next_tile, next_span)};
    multiply_floats<kSlots, kSameWeights, kPanels>(job, scratch, table, slots, steps(span),
                                                   prefetch, lines, scratch.product[0][0][0]);
    add<kPanels>(tile, span, scratch.product[0][0][0], sums);
    if (kSlots == 2) add<kPanels>(next_tile, next_span, scratch.product[1][0][0], sums);
  }

  template <int kPanels>
  void run(Prefetch& prefetch, int lines, float* sums) const {
    const int64_t row_tiles = ceil_div(job.m, kTileRows);
    int64_t tile = 0;
    for (; tile + 2 <= row_tiles; tile += 2) {
      for (int64_t s = 0; s < span_count; ++s) {
        multiply<2, true, kPanels>(tile, s, tile + 1, s, prefetch, lines, sums);
      }
    }
    for (int64_t s = 0; tile < row_tiles && s < span_count;) {
      if (s + 1 < span_count && steps(s) == steps(s + 1)) {
        multiply<2, false, kPanels>(tile, s, tile, s + 1, prefetch, 2 * lines, sums);
        s += 2;
      } else {
        multiply<1, true, kPanels>(tile, s, tile, s, prefetch, lines, sums);
        s += 1;
      }
    }
  }
};

template <class Decoder>
void run_exact(const FloatTileJob& job, const Decoder& decoder, int64_t begin, int64_t end,
               void* memory) {
  auto& scratch = *static_cast<FloatScratch*>(memory);
  const Weight& weight = job.weight;
  const int64_t row_tiles = ceil_div(job.m, kTileRows);
  auto* all_sums = reinterpret_cast<float*>(&scratch + 1);
  Bf16Table table{};
  table.terms = 1;
  if constexpr (std::is_same_v<Decoder, Table4<V>>) table = bf16_table(decoder, job.table_terms);
  FloatChunk chunk{job, scratch, table, weight.has_zeros(), 0, {}, 0};
  const TileRegisters registers(job.m < kTileRows ? job.m : kTileRows);
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = end - panel < 2 ? 1 : 2;
    const auto bytes = static_cast<size_t>(row_tiles * kTileRows * 2 * kLanes) * sizeof(float);
    __builtin_memset(all_sums, 0, bytes);
    for (int64_t first = 0; first < weight.columns();) {
      const int64_t last = chunk_end(weight, first, kGroupedChunk);
      chunk.first = first;
      chunk.span_count = spans_of(weight, first, last, chunk.spans);
      Prefetch prefetch = next_chunk(weight, panel, end, last, kGroupedChunk);
      for (int64_t p = 0; p < panels; ++p) {
        decode_exactly(weight, decoder, table, panel + p, first, last, scratch.tiles[0][p][0],
                       sizeof scratch.tiles[0], prefetch);
        for (int64_t s = 0; s < chunk.span_count; ++s) {
          const int64_t g = chunk.spans[s].group;
          V::store(scratch.scales[s][p], scales_without_zero_groups<V>(weight, panel + p, g));
          V::store(scratch.zeros[s][p], group_zeros<V>(weight, panel + p, g, decoder.offset));
        }
      }
      const int lines = prefetch.lines(ceil_div(row_tiles, 2) * ((last - first) / kFloatStep));
      if (panels == 2)
        chunk.run<2>(prefetch, lines, all_sums);
      else
        chunk.run<1>(prefetch, lines, all_sums);
      first = last;
    }
    const OutputColumns columns(job.out, weight, panel, panels);
    const float* sums = all_sums;
    for (int64_t row = 0; row < job.m; ++row, sums += 2 * kLanes) {
      for (int64_t p = 0; p < panels; ++p) {
        F sum = V::load(sums + p * kLanes);
        if (job.out.row_scales != nullptr) {
          sum = V::mul(V::broadcast(job.out.row_scales[row]), sum);
        }
        columns.write(job.out, row, row * weight.n + (panel + p) * kLanes, p, sum);
      }
    }
  }
}

void pack_float_tile(const void* x, FloatType type, int64_t x_stride, int64_t row, int64_t m,
                     int64_t k, const Weight& weight, int terms, bool in_order, uint16_t* out) {
  if (QK_FAULT(tile_columns_in_order)) in_order = true;
  const int64_t columns = weight.columns();
  const I order = _mm512_broadcast_i32x4(!in_order && is_nibble(weight.code) ? V::order_of_pairs()
                                                                             : V::bytes_in_order());
  // Fewer rows than a tile has are not padded: see TileRegisters.
  const int64_t rows = m < kTileRows ? m : kTileRows;
  for (int64_t r = 0; r < rows; ++r) {
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

struct Int8Scratch {
  char tiles[2][kGroupedChunk / kInt8Step][kTileBytes];
  int32_t product[2][2][kTileRows][kLanes];
  // Then the sums: fp32 [m in tiles][32].
};

template <int kRowTiles, int kPanels>
void multiply_group(const Int8TileJob& job, const Int8Scratch& scratch, int64_t row_tile,
                    int64_t chunk_first, Span span, Prefetch& prefetch, int lines,
                    int32_t* product) {
  zero_tiles<kRowTiles, kPanels>();
  const int64_t steps = job.weight.columns() / kInt8Step;
  const int8_t* x0 = job.x + row_tile * steps * kTileBytes;
  const int8_t* x1 = x0 + steps * kTileBytes;
  for (int64_t step = span.first / kInt8Step; step < span.last / kInt8Step; ++step) {
    const int64_t local = step - chunk_first / kInt8Step;
    prefetch.ask(lines);
    _tile_loadd(6, scratch.tiles[0][local], 64);
    if constexpr (kPanels == 2) _tile_loadd(7, scratch.tiles[1][local], 64);
    _tile_loadd(4, x0 + step * kTileBytes, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kPanels == 2) _tile_dpbsud(1, 4, 7);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, x1 + step * kTileBytes, 64);
      _tile_dpbsud(2, 5, 6);
      if constexpr (kPanels == 2) _tile_dpbsud(3, 5, 7);
    }
  }
  store_tiles<kRowTiles, kPanels>(product, 2 * kTileBytes, kTileBytes);
}

// fp32 sums in the order of groups, products rounded before they are added, as the reference does.
template <int kRowTiles, int kPanels>
void add_groups(const Int8TileJob& job, Int8Scratch& scratch, int64_t row_tile, int64_t panel,
                int64_t chunk_first, const Span* spans, int64_t span_count, Prefetch& prefetch,
                int lines, float* sums) {
  const Weight& weight = job.weight;
  if (QK_FAULT(tile_last_group_missing)) --span_count;
  for (int64_t s = 0; s < span_count; ++s) {
    const int64_t g = spans[s].group;
    int32_t* product = scratch.product[0][0][0];
    multiply_group<kRowTiles, kPanels>(job, scratch, row_tile, chunk_first, spans[s], prefetch,
                                       lines, product);
    for (int p = 0; p < kPanels; ++p) {
      const F scale = group_scales<V>(weight, panel + p, g);
      const I zero = group_integer_zeros<V>(weight, panel + p, g);
      for (int i = 0; i < kRowTiles; ++i) {
        const int64_t row = (row_tile + i) * kTileRows;
        const int64_t rows = job.m - row < kTileRows ? job.m - row : kTileRows;
        const int32_t* from = product + (2 * i + p) * kTileRows * kLanes;
        const int32_t* x_sums = job.x_sums + row * weight.groups() + g;
        float* to = sums + row * 2 * kLanes + p * kLanes;
        for (int64_t r = 0; r < rows; ++r, to += 2 * kLanes) {
          const I x_sum = V::broadcast(x_sums[r * weight.groups()]);
          const I part = V::sub(V::load(from + r * kLanes), V::mul(zero, x_sum));
          V::store(to, V::add(V::load(to), V::mul(scale, V::to_float(part))));
        }
      }
    }
  }
}

template <int kPanels>
void add_group_rows(const Int8TileJob& job, Int8Scratch& scratch, int64_t panel, int64_t first,
                    const Span* spans, int64_t span_count, Prefetch& prefetch, int lines,
                    float* sums) {
  const int64_t row_tiles = ceil_div(job.m, kTileRows);
  int64_t tile = 0;
  for (; tile + 2 <= row_tiles; tile += 2) {
    add_groups<2, kPanels>(job, scratch, tile, panel, first, spans, span_count, prefetch, lines,
                           sums);
  }
  if (tile < row_tiles) {
    add_groups<1, kPanels>(job, scratch, tile, panel, first, spans, span_count, prefetch, lines,
                           sums);
  }
}

inline void run_int8_groups(const Int8TileJob& job, int64_t begin, int64_t end, void* memory) {
  auto& scratch = *static_cast<Int8Scratch*>(memory);
  const Weight& weight = job.weight;
  const int64_t row_tiles = ceil_div(job.m, kTileRows);
  auto* sums = reinterpret_cast<float*>(&scratch + 1);
  const TileRegisters registers(job.m < kTileRows ? job.m : kTileRows);
  for (int64_t panel = begin; panel < end; panel += 2) {
    const int64_t panels = end - panel < 2 ? 1 : 2;
    __builtin_memset(sums, 0, static_cast<size_t>(row_tiles * kTileRows * 2 * kLanes) * 4);
    for (int64_t first = 0; first < weight.columns();) {
      const int64_t last = chunk_end(weight, first, kGroupedChunk);
      Span spans[kMostSpans];
      const int64_t span_count = spans_of(weight, first, last, spans);
      for (int64_t p = 0; p < panels; ++p) {
        if (is_nibble(weight.code)) {
          decode_bytes(weight, panel + p, first, last, scratch.tiles[p][0]);
        } else {
          const uint32_t* words = weight.words + (panel + p) * weight.panel_words();
          __builtin_memcpy(scratch.tiles[p][0], words + first / 4 * kLanes,
                           static_cast<size_t>((last - first) * kLanes));
        }
      }
      Prefetch prefetch = next_chunk(weight, panel, end, last, kGroupedChunk);
      const int lines = prefetch.lines(ceil_div(row_tiles, 2) * ((last - first) / kInt8Step));
      const auto add = panels == 2 ? add_group_rows<2> : add_group_rows<1>;
      add(job, scratch, panel, first, spans, span_count, prefetch, lines, sums);
      first = last;
    }
    const OutputColumns columns(job.out, weight, panel, panels);
    for (int64_t row = 0; row < job.m; ++row) {
      const F row_scale = V::broadcast(job.out.row_scales[row]);
      for (int64_t p = 0; p < panels; ++p) {
        const F sum = V::load(sums + (row * 2 + p) * kLanes);
        columns.write(job.out, row, row * weight.n + (panel + p) * kLanes, p,
                      V::mul(row_scale, sum));
      }
    }
  }
}

// Bytes that these take of the scratch of a task.
inline int64_t grouped_scratch(int64_t m) {
  constexpr auto kFixed =
      sizeof(FloatScratch) > sizeof(Int8Scratch) ? sizeof(FloatScratch) : sizeof(Int8Scratch);
  return static_cast<int64_t>(kFixed) + ceil_div(m, kTileRows) * kTileRows * 2 * kLanes * 4;
}

}  // namespace
}  // namespace qkernels::cpu
