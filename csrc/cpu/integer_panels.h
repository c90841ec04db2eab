// Many rows of x in int8 times weights of which all sums run over all of K: what tiles of
// whole_tiles.h do, on vectors.
//
// Three panels are multiplied with eight rows at a time, whose sums stay in registers while the
// panels stream from the L2 cache. The first eight rows decode codes of up to 4 bits on the way and
// leave bytes for the others; all of them ask for the weights that come next. Only for source files
// after QK_TARGET.

#pragma once

#include <type_traits>

#include "cpu/faults.h"
#include "cpu/integer_weights.h"
#include "cpu/kernels.h"

namespace qkernels::cpu {

// Columns that meet all rows before others do: three panels of their bytes, and the weights that
// come next, leave half of an L2 cache of 1 MB to x.
constexpr int64_t kIntegerChunk = 4096;
constexpr int64_t kIntegerRows = 8, kIntegerPanels = 3;

inline int64_t integer_scratch(int64_t m, int64_t) {
  const int64_t rows = ceil_div(m, kIntegerRows) * kIntegerRows;
  return (kIntegerPanels * (kIntegerChunk / 4 + rows) * kLanes + rows) * 4;
}

// A row of x [columns] into row `row` of a tile, [block of 8 rows][columns / 4][8] words.
inline void pack_integer_row(const int8_t* x, int64_t columns, int64_t row, int8_t* tile) {
  int8_t* const block = tile + row / kIntegerRows * kIntegerRows * columns;
  for (int64_t c = 0; c < columns; c += 4) {
    __builtin_memcpy(block + c * kIntegerRows + row % kIntegerRows * 4, x + c, 4);
  }
}

// Both readers give words of bytes: of eight columns, step `step`, the first four or the others.
template <class V, int kPanels>
struct ByteReader {
  const uint32_t* bytes[kPanels];

  // The end of the steps from `step` on that are read alike.
  QK_INLINE int64_t begin(int64_t, int64_t steps) { return steps; }

  template <int kHalf>
  QK_INLINE typename V::I read(int p, int64_t step) const {
    return V::load(bytes[p] + (2 * step + kHalf) * kLanes);
  }
};

// Of codes of up to 4 bits; it leaves the bytes in `bytes`.
template <class V, int kPanels>
struct CodeReader {
  const Weight& weight;
  int64_t panel, first;  // column of step 0
  const uint32_t* codes[kPanels];
  int32_t* bytes[kPanels];
  ByteDecoder<V> decoders[kPanels];

  QK_INLINE int64_t begin(int64_t step, int64_t steps) {
    const int64_t g = weight.groups() == 1 ? 0 : (first + 8 * step) / weight.group;
    QK_UNROLL for (int p = 0; p < kPanels; ++p) decoders[p] = {weight, panel + p, g};
    const int64_t end = (weight.group_end(g) - first) / 8;
    return end < steps ? end : steps;
  }

  template <int kHalf>
  QK_INLINE typename V::I read(int p, int64_t step) const {
    const auto word = V::load(codes[p] + step * kLanes);
    const auto four = decoders[p].bytes(kHalf == 0 ? word : V::template right<4>(word));
    V::store(bytes[p] + (2 * step + kHalf) * kLanes, four);
    return four;
  }
};

// A part of the weights that come next: `lines` of each panel from `from` on, `stride` words apart.
struct ComingLines {
  const uint32_t* from;
  int64_t stride, lines;
};

// Adds `steps` times eight columns of some rows of a block and some panels to sums
// [rows][kIntegerPanels][16].
template <class V, int kRows, int kPanels, class Reader>
__attribute__((noinline)) void add_integers(Reader reader, const int32_t* x, int64_t steps,
                                            ComingLines coming, bool first, int32_t* sums) {
  using I = typename V::I;
  I sum[kRows][kPanels];
  if (QK_FAULT(integer_sums_begin_anew)) first = true;
  QK_UNROLL for (int i = 0; i < kRows; ++i) {
    QK_UNROLL for (int p = 0; p < kPanels; ++p) {
      const int32_t* before = sums + (i * kIntegerPanels + p) * kLanes;
      sum[i][p] = first ? V::broadcast(int32_t{0}) : V::load(before);
    }
  }
  const auto multiply = [&](const I(&words)[kPanels]) QK_LAMBDA_INLINE {
    QK_UNROLL for (int i = 0; i < kRows; ++i) {
      const I four = V::broadcast(x[i]);
      QK_UNROLL for (int p = 0; p < kPanels; ++p) {
        sum[i][p] = V::template dot<false>(sum[i][p], words[p], four);
      }
    }
    x += kIntegerRows;
  };
  const int64_t rate = (coming.lines << 16) / steps;  // so that lines are asked for evenly
  for (int64_t step = 0; step < steps;) {
    const int64_t end = reader.begin(step, steps);
    for (; step < end; ++step) {
      const uint32_t* line = coming.from + (step * rate >> 16) * kLanes;
      QK_UNROLL for (int p = 0; p < kPanels; ++p) QK_PREFETCH_FAR(line + p * coming.stride);
      I words[kPanels];
      QK_UNROLL for (int p = 0; p < kPanels; ++p) words[p] = reader.template read<0>(p, step);
      multiply(words);
      QK_UNROLL for (int p = 0; p < kPanels; ++p) words[p] = reader.template read<1>(p, step);
      multiply(words);
    }
  }
  QK_UNROLL for (int i = 0; i < kRows; ++i) {
    QK_UNROLL for (int p = 0; p < kPanels; ++p) {
      V::store(sums + (i * kIntegerPanels + p) * kLanes, sum[i][p]);
    }
  }
}

template <class V>
class IntegerPanels {
 public:
  IntegerPanels(const Int8TileJob& job, void* scratch)
      : job_(job),
        blocks_(ceil_div(job.m, kIntegerRows)),
        decoded_(static_cast<int32_t*>(scratch)),
        sums_(decoded_ + kIntegerPanels * kIntegerChunk / 4 * kLanes),
        totals_(sums_ + kIntegerPanels * blocks_ * kIntegerRows * kLanes) {
    add_up_groups(job.x_sums, job.m, job.weight.groups(), totals_);
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t panel = begin; panel < end; panel += kIntegerPanels) {
      switch (end - panel) {
        case 1: run_panels<1>(panel); break;
        case 2: run_panels<2>(panel); break;
        default: run_panels<3>(panel); break;
      }
    }
  }

 private:
  template <int kRows>
  using Rows = std::integral_constant<int, kRows>;

  template <int kPanels>
  void run_panels(int64_t panel) const {
    const int64_t columns = job_.weight.columns();
    for (int64_t first = 0; first < columns; first += kIntegerChunk) {
      const int64_t last = columns - first < kIntegerChunk ? columns : first + kIntegerChunk;
      add_chunk<kPanels>(panel, first, last);
    }
    finish<kPanels>(panel);
  }

  template <int kPanels>
  void add_chunk(int64_t panel, int64_t first, int64_t last) const {
    const Weight& weight = job_.weight;
    const int64_t columns = weight.columns(), steps = (last - first) / 8;
    const bool decodes = is_nibble(weight.code);
    CodeReader<V, kPanels> codes{weight, panel, first, {}, {}, {}};
    ByteReader<V, kPanels> bytes;
    for (int p = 0; p < kPanels; ++p) {
      const uint32_t* words =
          weight.words + (panel + p) * weight.panel_words() + weight.words_before(first);
      codes.codes[p] = words;
      codes.bytes[p] = decoded_ + p * kIntegerChunk / 4 * kLanes;
      bytes.bytes[p] = decodes ? reinterpret_cast<const uint32_t*>(codes.bytes[p]) : words;
    }
    for (int64_t b = 0; b < blocks_; ++b) {
      const auto* x =
          reinterpret_cast<const int32_t*>(job_.x) + (b * columns / 4 + first / 4) * kIntegerRows;
      int32_t* sums = sums_ + b * kIntegerRows * kIntegerPanels * kLanes;
      const ComingLines coming = coming_lines<kPanels>(panel, first, last, b);
      const auto add = [&](auto rows, auto reader) {
        add_integers<V, decltype(rows)::value, kPanels>(reader, x, steps, coming, first == 0, sums);
      };
      const int64_t rows = job_.m - b * kIntegerRows;
      if (b == 0 && decodes)
        add(Rows<8>(), codes);
      else if (rows > 4)
        add(Rows<8>(), bytes);
      else if (rows > 2)
        add(Rows<4>(), bytes);
      else if (rows == 2)
        add(Rows<2>(), bytes);
      else
        add(Rows<1>(), bytes);
    }
  }

  // Of the chunk behind columns [first, last), or of the next panels' first, what is to be asked
  // for while block `b` is multiplied.
  template <int kPanels>
  QK_INLINE ComingLines coming_lines(int64_t panel, int64_t first, int64_t last, int64_t b) const {
    const Weight& weight = job_.weight;
    const int64_t lines = weight.words_before(last - first) / kLanes;
    const int64_t begin = lines * b / blocks_, end = lines * (b + 1) / blocks_;
    const uint32_t* from = weight.words + panel * weight.panel_words() + begin * kLanes;
    from += last < weight.columns() ? weight.words_before(last) : kPanels * weight.panel_words();
    return {from, weight.panel_words(), end - begin};
  }

  template <int kPanels>
  void finish(int64_t panel) const {
    for (int p = 0; p < kPanels; ++p) {
      const auto zeros = byte_zeros<V>(job_.weight, panel + p);
      for (int64_t row = 0; row < job_.m; ++row) {
        const auto sum = V::load(sums_ + (row * kIntegerPanels + p) * kLanes);
        const auto less = V::mul(zeros, V::broadcast(totals_[row]));
        write_output<V>(job_.out, job_.weight, row, panel + p, V::sub(sum, less));
      }
    }
  }

  const Int8TileJob& job_;
  const int64_t blocks_;  // of rows
  int32_t* decoded_;      // [panel][kIntegerChunk / 4][16]
  int32_t* sums_;         // [rows][kIntegerPanels][16]
  int32_t* totals_;       // [rows]
};

template <class V>
void integer_panels(const Int8TileJob& job, int64_t begin, int64_t end, void* scratch) {
  IntegerPanels<V>(job, scratch).run(begin, end);
}

}  // namespace qkernels::cpu
