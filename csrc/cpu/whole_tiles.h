// Products on AMX tiles whose sums run over all of K: of int8, where scales are multiplied into the
// weights or wait for the end, and of bf16, with scaled weights rounded to bf16.
//
// A chunk of two panels is decoded into the L1 cache and multiplied with the same chunk of all
// rows, which comes from the L2 cache. Tiles of sums go to memory and back for each chunk: longer
// ones, whose weights would come from the L2 cache too, were slower.

#pragma once

#include "cpu/faults.h"
#include "cpu/scaled_weights.h"
#include "cpu/tiles.h"
#include "cpu/vector_avx512_bf16.h"

namespace qkernels::cpu {
namespace {

constexpr int64_t kChunkSteps = 8;

// x and weights of a kind of product:
//   kStep                            columns of a tile
//   kIntegers                        int8, else bf16
//   x(row_tile)                      its first tile
//   tiles(panel, first)              the weights as they lie, where they are tiles; else null
//   decode(panel, first, last, out)  into tiles
//   finish(panel, panels, sums, stride)

// Registers of tiles are named by literals.
#define QK_MULTIPLY_TILES(sum, x, weights) \
  do {                                     \
    if constexpr (Kind::kIntegers)         \
      _tile_dpbsud(sum, x, weights);       \
    else                                   \
      _tile_dpbf16ps(sum, x, weights);     \
  } while (false)

template <class Kind, int kRowTiles, int kPanels>
__attribute__((noinline)) void multiply_chunk(const char* const* weights, const char* x,
                                              int64_t x_stride, int64_t steps, bool first,
                                              int32_t* sums, int64_t panel_sums, Prefetch& prefetch,
                                              int lines) {
  constexpr int64_t kRowTile = kTileRows * kLanes;
  constexpr bool kPair = kRowTiles == 2;
  int32_t* second = sums + kRowTile;
  if (QK_FAULT(tile_sums_begin_anew)) first = true;
  if (QK_FAULT(tile_second_rows_are_the_first)) x_stride = 0;
  if (first) {
    zero_tiles<kRowTiles, kPanels>();
  } else {
    _tile_loadd(0, sums, 64);
    if constexpr (kPanels == 2) _tile_loadd(1, sums + panel_sums, 64);
    if constexpr (kPair) _tile_loadd(2, second, 64);
    if constexpr (kPair && kPanels == 2) _tile_loadd(3, second + panel_sums, 64);
  }
  for (int64_t at = 0; at < steps * kTileBytes; at += kTileBytes) {
    prefetch.ask(lines);
    _tile_loadd(6, weights[0] + at, 64);
    if constexpr (kPanels == 2) _tile_loadd(7, weights[1] + at, 64);
    _tile_loadd(4, x + at, 64);
    QK_MULTIPLY_TILES(0, 4, 6);
    if constexpr (kPanels == 2) QK_MULTIPLY_TILES(1, 4, 7);
    if constexpr (kPair) {
      _tile_loadd(5, x + x_stride + at, 64);
      QK_MULTIPLY_TILES(2, 5, 6);
      if constexpr (kPanels == 2) QK_MULTIPLY_TILES(3, 5, 7);
    }
  }
  store_tiles<kRowTiles, kPanels>(sums, kTileBytes, panel_sums * 4);
}

template <class Kind>
struct WholeTiles {
  const Kind& kind;
  const Weight& weight;
  int64_t m;
  char* decoded;
  int32_t* sums;  // [panels][m in tiles][16]

  int64_t row_tiles() const { return ceil_div(m, kTileRows); }
  int64_t panel_sums() const { return row_tiles() * kTileRows * kLanes; }

  template <int kRowTiles, int kPanels>
  void add(const char* const* weights, int64_t panel, int64_t tile, int64_t first, int64_t last,
           Prefetch& prefetch, int lines) const {
    const int64_t steps = weight.columns() / Kind::kStep;
    multiply_chunk<Kind, kRowTiles, kPanels>(
        weights, kind.x(tile) + first / Kind::kStep * kTileBytes, steps * kTileBytes,
        (last - first) / Kind::kStep, first == 0,
        sums + panel * panel_sums() + tile * kTileRows * kLanes, panel_sums(), prefetch, lines);
  }

  // All rows of x and one or two panels, from `panel` of the task on.
  void add_rows(const char* const* weights, int64_t panel, int64_t panels, int64_t first,
                int64_t last, Prefetch& prefetch, int lines) const {
    const auto pair = panels == 2;
    int64_t tile = 0;
    for (; tile + 2 <= row_tiles(); tile += 2) {
      if (pair)
        add<2, 2>(weights, panel, tile, first, last, prefetch, lines);
      else
        add<2, 1>(weights, panel, tile, first, last, prefetch, lines);
    }
    if (tile == row_tiles()) return;
    if (pair)
      add<1, 2>(weights, panel, tile, first, last, prefetch, lines);
    else
      add<1, 1>(weights, panel, tile, first, last, prefetch, lines);
  }

  // A chunk [first, last) of `panels` panels from `panel` on; and asks for another one.
  void add_chunk(int64_t begin, int64_t panel, int64_t panels, int64_t first, int64_t last,
                 Prefetch prefetch) const {
    const char* weights[2];
    for (int64_t p = 0; p < panels; ++p) {
      weights[p] = kind.tiles(panel + p, first);
      if (weights[p] != nullptr) continue;
      char* out = decoded + p * (last - first) / Kind::kStep * kTileBytes;
      kind.decode(panel + p, first, last, out);
      weights[p] = out;
    }
    const int64_t times = ceil_div(row_tiles(), 2) * ((last - first) / Kind::kStep);
    add_rows(weights, panel - begin, panels, first, last, prefetch, prefetch.lines(times));
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t chunk = kChunkSteps * Kind::kStep, columns = weight.columns();
    const TileRegisters registers(m < kTileRows ? m : kTileRows);
    // Where all of x stays in the L2 cache, panels are finished one after the other, so that
    // weights stream; else a chunk of x is used by all panels of the task.
    const bool along_k = stays_cached(row_tiles() * kTileRows * columns * 64 / Kind::kStep);
    int64_t panel = begin, first = 0;
    for (bool more = true; more;) {
      const int64_t last = columns - first < chunk ? columns : first + chunk;
      const bool last_panels = panel + 2 >= end;
      int64_t next = panel, next_first = last;
      if (along_k && last == columns) {
        next = panel + 2;
        next_first = 0;
      } else if (!along_k) {
        next = last_panels ? begin : panel + 2;
        next_first = last_panels ? last : first;
      }
      more = next < end && next_first < columns;
      const int64_t next_end = end - next < 2 ? end : next + 2;
      const int64_t next_last = columns - next_first < chunk ? columns : next_first + chunk;
      add_chunk(begin, panel, last_panels ? end - panel : 2, first, last,
                Prefetch(weight, next, next_end, next_first, more ? next_last : next_first));
      panel = next;
      first = next_first;
    }
    for (int64_t p = begin; p < end; p += 2) {
      kind.finish(p, end - p < 2 ? 1 : 2, sums + (p - begin) * panel_sums(), panel_sums());
    }
  }
};

// --- bf16

template <class Decoder>
class ScaledTiles {
 public:
  static constexpr int64_t kStep = 32;
  static constexpr bool kIntegers = false;

  ScaledTiles(const FloatTileJob& job, const Decoder& decoder)
      : job_(job), weights_(job.weight, decoder) {}

  const char* x(int64_t row_tile) const {
    return reinterpret_cast<const char*>(job_.x) +
           row_tile * (job_.weight.columns() / kStep) * kTileBytes;
  }
  const char* tiles(int64_t, int64_t) const { return nullptr; }

  void decode(int64_t panel, int64_t first, int64_t last, char* out) const {
    weights_.template decode<1>(panel, first, last, out);
  }

  __attribute__((noinline)) void finish(int64_t panel, int64_t panels, const int32_t* sums,
                                        int64_t stride) const {
    const OutputColumns columns(job_.out, job_.weight, panel, panels);
    for (int64_t row = 0; row < job_.m; ++row, sums += kLanes) {
      for (int64_t p = 0; p < panels; ++p) {
        F sum = V::load(reinterpret_cast<const float*>(sums + p * stride));
        if (job_.out.row_scales != nullptr) {
          sum = V::mul(V::broadcast(job_.out.row_scales[row]), sum);
        }
        columns.write(job_.out, row, row * job_.weight.n + (panel + p) * kLanes, p, sum);
      }
    }
  }

 private:
  const FloatTileJob& job_;
  const ScaledWeights<Avx512Bf16, Decoder> weights_;
};

// --- Integers

class IntegerTiles {
 public:
  static constexpr int64_t kStep = 64;
  static constexpr bool kIntegers = true;

  // `x_totals` [m]: the sums of the rows of x.
  IntegerTiles(const Int8TileJob& job, const int32_t* x_totals) : job_(job), x_totals_(x_totals) {}

  const char* x(int64_t row_tile) const {
    return reinterpret_cast<const char*>(job_.x) +
           row_tile * (job_.weight.columns() / kStep) * kTileBytes;
  }
  // Steps of 8-bit codes are tiles as they lie.
  const char* tiles(int64_t panel, int64_t first) const {
    if (is_nibble(job_.weight.code)) return nullptr;
    return reinterpret_cast<const char*>(job_.weight.words + panel * job_.weight.panel_words() +
                                         first / 4 * kLanes);
  }
  __attribute__((noinline)) void decode(int64_t panel, int64_t first, int64_t last,
                                        char* out) const {
    decode_bytes(job_.weight, panel, first, last, out);
  }

  __attribute__((noinline)) void finish(int64_t panel, int64_t panels, const int32_t* sums,
                                        int64_t stride) const {
    const Weight& weight = job_.weight;
    const OutputColumns columns(job_.out, weight, panel, panels);
    F scales[2] = {};
    I zeros[2] = {};
    for (int64_t p = 0; p < panels; ++p) {
      scales[p] = channel_scales<V>(weight, panel + p);
      zeros[p] = byte_zeros<V>(weight, panel + p);
    }
    for (int64_t row = 0; row < job_.m; ++row, sums += kLanes) {
      const F row_scale = V::broadcast(job_.out.row_scales[row]);
      const I total = V::broadcast(x_totals_[row]);
      for (int64_t p = 0; p < panels; ++p) {
        const I sum = V::sub(V::load(sums + p * stride), V::mul(zeros[p], total));
        columns.write(job_.out, row, row * weight.n + (panel + p) * kLanes, p,
                      V::mul(V::mul(row_scale, scales[p]), V::to_float(sum)));
      }
    }
  }

 private:
  const Int8TileJob& job_;
  const int32_t* x_totals_;
};

constexpr int64_t kDecodedBytes = 2 * kChunkSteps * kTileBytes;

// Bytes that run_whole takes of the scratch of a task.
inline int64_t whole_scratch(int64_t m, int64_t panels) {
  const int64_t rows = ceil_div(m, kTileRows) * kTileRows;
  return kDecodedBytes + panels * rows * kLanes * 4 + rows * 4;
}

template <class Decoder>
void run_scaled(const FloatTileJob& job, const Decoder& decoder, int64_t begin, int64_t end,
                void* scratch) {
  const ScaledTiles<Decoder> kind(job, decoder);
  auto* memory = static_cast<char*>(scratch);
  auto* sums = reinterpret_cast<int32_t*>(memory + kDecodedBytes);
  WholeTiles<ScaledTiles<Decoder>>{kind, job.weight, job.m, memory, sums}.run(begin, end);
}

inline void run_integers(const Int8TileJob& job, int64_t begin, int64_t end, void* scratch) {
  auto* memory = static_cast<char*>(scratch);
  auto* totals = reinterpret_cast<int32_t*>(memory + kDecodedBytes);
  const int64_t rows = ceil_div(job.m, kTileRows) * kTileRows;
  add_up_groups(job.x_sums, job.m, job.weight.groups(), totals);
  const IntegerTiles kind(job, totals);
  WholeTiles<IntegerTiles>{kind, job.weight, job.m, memory, totals + rows}.run(begin, end);
}

}  // namespace
}  // namespace qkernels::cpu
