// int8_mma: the walk (products/walk.cuh) in integers, for mma.m16n8k32. Codes of 8 bits lie in
// memory as the A operand; those of 4 bits become it in registers (decode.cuh).
//
// Sums are int32, of all of K where a row has one scale or its groups have integer multipliers. Of
// floating scales of groups they are of a group, and added in fp32 with its scale.
//
// Where x has zero points (kShifted), each sum is to be less zero * (the sum of the row's weights).
// The tensor cores add these up too: by a B operand of ones in the columns that are not padding.
// Each piece then makes up for its own columns, so that what blocks leave to each other are plain
// sums.

#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/activations/pieces.cuh"
#include "cuda/int8/parameters.cuh"
#include "cuda/products/walk.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

template <class Decoder, bool kGrouped, bool kShifted, int kTokens>
class Int8Block
    : public Walk<Int8Block<Decoder, kGrouped, kShifted, kTokens>, Int8Parameters, Decoder::kBits,
                  kTokens, 1, std::conditional_t<kGrouped, float, int32_t>> {
  using Number = std::conditional_t<kGrouped, float, int32_t>;
  using Base = Walk<Int8Block, Int8Parameters, Decoder::kBits, kTokens, 1, Number>;
  friend Base;
  using Base::kUnits, Base::kWarpChunks, Base::kWarpColumns, Base::kTokenTiles;
  using Base::p_, Base::lane_, Base::read_, Base::tokens_, Base::token0_, Base::block_row_;

  static constexpr int kColumns = 32;  // of a step
  static constexpr int kSteps = kChunkColumns / kColumns;
  static constexpr bool kHasGroups = kGrouped || Decoder::kHasGroups;
  static constexpr bool kHoldsX = kTokens <= 16;
  static constexpr bool kCopiesGroups = kHasGroups;
  static constexpr bool kHasExperts = false;
  static_assert(kWarpChunks <= 2, "two chunks of a row of x are 128 bytes");

 public:
  using Base::Base;

 private:
  QK_DEVICE void start() {}

  QK_DEVICE void start_groups() {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) scales_[tile] = {0, 0};
  }

  QK_DEVICE void multiply_piece() {
    // Every so many columns that a warp takes, from the first one of a stage on, lie in one group.
    constexpr bool kTwo = kWarpChunks > 1;
    if (!kHasGroups || (kTwo && (p_.group_columns | this->piece_column_) % kWarpColumns == 0)) {
      this->template multiply_stages<kWarpColumns>();
    } else if constexpr (kHasGroups) {
      if (p_.group_columns % kChunkColumns == 0) {
        this->template multiply_stages<kChunkColumns>();
      } else {
        this->template multiply_stages<kColumns>();
      }
    }
  }

  template <int kRun>
  QK_DEVICE void multiply_chunks(uint32_t rest, uint32_t slot) {
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) multiply_chunk<kRun>(c, rest, slot);
  }

  // `c`: which of the warp's chunks of the stage; its first column is `rest` columns into the group
  // in `slot`, which are left as those of the chunk behind it.
  template <int kRun>
  QK_DEVICE void multiply_chunk(int c, uint32_t& rest, uint32_t& slot) {
    uint32_t words[kTilesPerWarp][kUnits][4];
    load_words(c, words);
    const ptx::Shared x = this->fragments_[c] + read_;
    uint32_t held[kHoldsX ? kTokenTiles : 1][4];
    if constexpr (kHoldsX) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) load_x(x, t, held[t]);
    }
    // Sums of a group end before the next step enters another one.
    constexpr bool kStepwise = kGrouped && kRun < kChunkColumns;
    uint32_t a[kSteps][kTilesPerWarp][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = c * kChunkColumns + s * kColumns;
      if (kHasGroups && column % kRun == 0) enter_group(slot);
#pragma unroll
      for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[s][tile][j] = Decoder::decode(words[tile], s, j, bytes_[tile][j % 2]);
        }
      }
      if constexpr (kShifted) {
        // `rest` is where a run of columns begins.
        constexpr int kFrom = kRun < kChunkColumns ? kColumns : kRun;
        add_row_sums(column, rest + column % kFrom, a[s]);
      }
      if constexpr (kStepwise) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          if constexpr (!kHoldsX) load_x(x, t, held[0]);
          multiply_step(s, t, a[s], held[kHoldsX ? t : 0]);
        }
      }
      if (kRun < kChunkColumns) this->pass(kRun, rest, slot);
    }
    if constexpr (!kStepwise) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        if constexpr (!kHoldsX) load_x(x, t, held[0]);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) multiply_step(s, t, a[s], held[kHoldsX ? t : 0]);
      }
    }
    if (kHasGroups && c + 1 < kWarpChunks && kRun == kChunkColumns) {
      this->pass(kChunkColumns, rest, slot);
    }
  }

  QK_DEVICE void load_words(int c, uint32_t (&words)[kTilesPerWarp][kUnits][4]) const {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int offset = tile * Base::kTileBytes + c * Base::kChunkBytes + u * kUnitBytes;
        const auto unit = ptx::load_shared<uint4>(this->words_ + read_ + offset);
        words[tile][u][0] = unit.x;
        words[tile][u][1] = unit.y;
        words[tile][u][2] = unit.z;
        words[tile][u][3] = unit.w;
      }
    }
  }

  // A chunk of tokens 8 t to 8 t + 7: registers 2 s and 2 s + 1 are the B operand of step s.
  static QK_DEVICE void load_x(ptx::Shared from, int t, uint32_t (&b)[4]) {
    ptx::ldmatrix_x4(b, from + t * 8 * Base::kRowBytes);
  }

  QK_DEVICE void multiply_step(int s, int t, const uint32_t (&a)[kTilesPerWarp][4],
                               const uint32_t (&b)[4]) {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      ptx::mma_m16n8k32(sums_[tile][t], a[tile], b[2 * s], b[2 * s + 1]);
    }
  }

  // `column` of the warp's columns of the stage, `rest` of its group.
  QK_DEVICE void add_row_sums(int column, uint32_t rest, const uint32_t (&a)[kTilesPerWarp][4]) {
    const int of_piece = this->columns_left_of_stage() - this->warp_k_ * kWarpColumns - column;
    const int of_group = p_.filled - static_cast<int>(rest);
    const int left = (of_piece < of_group ? of_piece : of_group) - lane_ % 4 * 4;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      ptx::mma_m16n8k32(row_sums_[tile], a[tile], ones(left), ones(left - 16));
    }
  }

  // 1 in the first `count` of four bytes.
  static QK_DEVICE uint32_t ones(int count) {
    return count <= 0 ? 0 : kEachByte >> (count < 4 ? 32 - 8 * count : 0);
  }

  // Makes scales_ and bytes_ those in `slot`. Two groups that a warp meets in turn never share one.
  QK_DEVICE void enter_group(uint32_t slot) {
    if (slot == this->loaded_slot_) return;
    if constexpr (kGrouped) scale_sums();
    this->loaded_slot_ = slot;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const int row = static_cast<int>(slot) * Base::kBlockRows + tile * kTileRows;
      const ptx::Shared scales = Base::scales_ + row * p_.scale_bytes;
      uint32_t multipliers = 0x0101, zeros = 0x0808;
      if constexpr (kGrouped) {
        scales_[tile] = load_floats<false>(scales, p_.weight.scale_type);
      } else if (p_.scale_bytes != 0) {
        multipliers = ptx::load_shared<uint16_t>(scales);
      }
      if constexpr (Decoder::kHasGroups) {
        if (p_.zero_bytes != 0) zeros = ptx::load_shared<uint16_t>(this->zeros_ + row);
        bytes_[tile][0] = ByteGroup(multipliers & 0xff, zeros & 0xff);
        bytes_[tile][1] = ByteGroup(multipliers >> 8, zeros >> 8);
      }
    }
  }

  // Adds the sums of the group that ends to those of all.
  QK_DEVICE void scale_sums() {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = i < 2 ? scales_[tile].low : scales_[tile].high;
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          float& total = totals_[tile][t][i];
          total = fmaf(static_cast<float>(sums_[tile][t][i]), scale, total);
          sums_[tile][t][i] = 0;
        }
        if (kShifted && i % 2 == 0) {
          float& total = row_totals_[tile][i / 2];
          total = fmaf(static_cast<float>(row_sums_[tile][i]), scale, total);
          row_sums_[tile][i] = 0;
        }
      }
    }
  }

  // Of the piece, as if x had no zero points.
  QK_DEVICE void end_sums() {
    if constexpr (kGrouped) scale_sums();
    if constexpr (kShifted) shift_sums();
  }

  QK_DEVICE void shift_sums() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = t * 8 + lane_ % 4 * 2 + j;
        if (!ptx::within(token, tokens_)) continue;
        const auto zero = ptx::load_global<int32_t>(p_.x_zeros + token0_ + token);
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
          for (int i = j; i < 4; i += 2) {
            if constexpr (kGrouped) {
              float& total = totals_[tile][t][i];
              total = fmaf(static_cast<float>(-zero), row_totals_[tile][i / 2], total);
            } else {  // what goes beyond 31 bits comes back
              const auto more =
                  static_cast<uint32_t>(zero) * static_cast<uint32_t>(row_sums_[tile][i / 2 * 2]);
              sums_[tile][t][i] =
                  static_cast<int32_t>(static_cast<uint32_t>(sums_[tile][t][i]) - more);
            }
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      row_totals_[tile][0] = row_totals_[tile][1] = 0;
#pragma unroll
      for (int32_t& sum : row_sums_[tile]) sum = 0;
    }
  }

  // The sum of everything, which is then 0 again.
  QK_DEVICE Number take_total(int tile, int t, int i) {
    if constexpr (kGrouped) {
      const float total = totals_[tile][t][i] * (1.0f / (1 << Decoder::kShift));
      totals_[tile][t][i] = 0;
      return total;
    } else {
      const int32_t sum = sums_[tile][t][i] >> Decoder::kShift;
      sums_[tile][t][i] = 0;
      return sum;
    }
  }

  // Of row n of the weight, where its sum is of all of K.
  QK_DEVICE float row_scale(int64_t n) const {
    if (p_.channel_scales != nullptr) return ptx::load_global<float>(p_.channel_scales + n);
    const int64_t row = n % kTileRows;
    return load_float(p_.weight.scales, p_.weight.scale_type, n - row + row % 8 * 2 + row / 8);
  }

  // Four outputs of a token, from row `row` of the block on.
  QK_DEVICE void write(int token, int row, const Four<Number>& sum) {
    const int64_t m = token0_ + token, n = block_row_ + row, limit = p_.weight.n;
    const auto x_scale = ptx::load_global<float>(p_.x_scales + m);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = 0;
      if (!ptx::within(n + i, limit)) continue;
      float scale = x_scale;
      if constexpr (!kGrouped) scale = ptx::mul(scale, row_scale(n + i));
      y[i] = ptx::mul(scale, static_cast<float>(sum.values[i]));
      if (p_.bias != nullptr) y[i] = ptx::add(y[i], load_float(p_.bias, p_.bias_type, n + i));
      if (p_.addend != nullptr) {
        y[i] = ptx::add(y[i], ptx::load_global<float>(p_.addend + m * limit + n + i));
      }
    }
    if (p_.gives_int8) {
      store<uint8_t>(m, n, as_int8(m, y));
    } else if (p_.y_type == FloatType::kFloat) {
      store<uint32_t>(
          m, n,
          uint4{ptx::as_bits(y[0]), ptx::as_bits(y[1]), ptx::as_bits(y[2]), ptx::as_bits(y[3])});
    } else {
      store<uint16_t>(m, n, rounded(y));
    }
  }

  // To y's type of 16 bits.
  QK_DEVICE uint2 rounded(const float (&y)[4]) const {
    if (p_.y_type == FloatType::kHalf) {
      return {ptx::pack2<Half>(y[0], y[1]), ptx::pack2<Half>(y[2], y[3])};
    }
    return {ptx::pack2<Bfloat16>(y[0], y[1]), ptx::pack2<Bfloat16>(y[2], y[3])};
  }

  // What the reader makes of y as rounded. Tells of a row with NaN or infinity.
  QK_DEVICE uint32_t as_int8(int64_t m, float (&y)[4]) const {
    if (p_.y_type != FloatType::kFloat) {
      const uint2 pairs = rounded(y);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto bits = static_cast<uint16_t>((i < 2 ? pairs.x : pairs.y) >> (i % 2 * 16));
        y[i] = p_.y_type == FloatType::kHalf ? ptx::to_float<Half>(bits)
                                             : ptx::to_float<Bfloat16>(bits);
      }
    }
    const bool has_zero = p_.reader.zero != nullptr;
    const int zero = has_zero ? ptx::load_global<int32_t>(p_.reader.zero) : 0;
    const int least = has_zero ? -128 : -127;
    Quotient quotient;
    quotient.start(ptx::load_global<float>(p_.reader.scale), false);
    bool finite = true;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p_.reader.relu && y[i] < 0) y[i] = 0;
      finite &= magnitude_bits(y[i]) < kInfinityBits;
      const float ratio = quotient(y[i]);
      const int near =
          ratio == ratio ? to_integer(ptx::max(ptx::min(ratio, 512.0f), -512.0f)) + zero : zero;
      const int code = near > 127 ? 127 : near < least ? least : near;
      word |= (static_cast<uint32_t>(code) & 0xff) << (8 * i);
    }
    constexpr uint32_t kNan = 0x7fc00000;
    // Whoever has other columns of the row may store the same.
    if (!finite) ptx::store_global<uint32_t>(p_.reader.row_scales + m, kNan);
    return word;
  }

  // Four numbers of y, by their bits, each a V.
  template <class V, class Words>
  QK_DEVICE void store(int64_t m, int64_t n, const Words& words) const {
    const int64_t limit = p_.weight.n;
    V* y = static_cast<V*>(p_.y) + m * limit + n;
    if (limit % 4 == 0) {
      if (ptx::within(n, limit)) ptx::store_global<Words>(y, words);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (ptx::within(n + i, limit)) ptx::store_global<V>(y + i, number<V>(words, i));
    }
  }

  template <class V>
  static QK_DEVICE V number(uint32_t word, int i) {
    return static_cast<V>(word >> (8 * i) & 0xff);
  }
  template <class V>
  static QK_DEVICE V number(const uint2& words, int i) {
    return static_cast<V>((i < 2 ? words.x : words.y) >> (i % 2 * 16));
  }
  template <class V>
  static QK_DEVICE V number(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }

  TwoFloats scales_[kTilesPerWarp];    // of the group at work,
  ByteGroup bytes_[kTilesPerWarp][2];  // or its multipliers and zero points
  int32_t sums_[kTilesPerWarp][kTokenTiles][4] = {};
  int32_t row_sums_[kTilesPerWarp][4] = {};  // of weights: [0] of row g, [2] of row g + 8
  // Of all groups, scaled.
  float totals_[kTilesPerWarp][kGrouped ? kTokenTiles : 1][4] = {};
  float row_totals_[kTilesPerWarp][2] = {};
};

// Blocks of a multiprocessor that the registers must suffice for; see resident_blocks.
template <class Decoder, bool kGrouped, int kTokens>
constexpr int kInt8Blocks = kTokens == 64 || (kTokens == 32 && (kGrouped || Decoder::kHasGroups)) ||
                                    (kTokens == 16 && kGrouped && Decoder::kHasGroups)
                                ? 1
                                : 2;

template <class Decoder, bool kGrouped, bool kShifted, int kTokens>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, (kInt8Blocks<Decoder, kGrouped, kTokens>))
    int8_mma_kernel(const QK_GRID_CONSTANT Int8Parameters parameters) {
  ptx::start_next_kernel();
  Int8Block<Decoder, kGrouped, kShifted, kTokens>(parameters, ptx::shared_memory()).run();
}

template <class Decoder, bool kGrouped, int kTokens>
const char* launch_tokens(const Int8Parameters& parameters, unsigned blocks, int shared_bytes,
                          Stream stream) {
  const auto kernel = parameters.x_zeros == nullptr
                          ? int8_mma_kernel<Decoder, kGrouped, false, kTokens>
                          : int8_mma_kernel<Decoder, kGrouped, true, kTokens>;
  return launch_early(kernel, dim3{blocks, 1, 1}, kThreads, shared_bytes, stream, parameters);
}

template <class Decoder, bool kGrouped>
const char* launch_int8(const Int8Parameters& parameters, int tokens, unsigned blocks,
                        int shared_bytes, Stream stream) {
  switch (tokens) {
    case 8: return launch_tokens<Decoder, kGrouped, 8>(parameters, blocks, shared_bytes, stream);
    case 16: return launch_tokens<Decoder, kGrouped, 16>(parameters, blocks, shared_bytes, stream);
    case 32: return launch_tokens<Decoder, kGrouped, 32>(parameters, blocks, shared_bytes, stream);
    default:
      if constexpr (!kGrouped) {  // see why_not
        return launch_tokens<Decoder, kGrouped, 64>(parameters, blocks, shared_bytes, stream);
      }
      return "sums of groups are of 32 tokens at most";
  }
}

}  // namespace qkernels
