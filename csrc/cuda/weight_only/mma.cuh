// weight_only_mma: the walk (products/walk.cuh) with W dequantized in registers to fp16 or bf16,
// for mma.m16n8k16.
//
// For few tokens the sums of a group are scaled, in fp32, where there are fewer of them than
// weights; for many tokens the weights are.

#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/products/walk.cuh"
#include "cuda/weight_only/parameters.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
class WeightOnlyBlock : public Walk<WeightOnlyBlock<T, Decoder, kRealZeros, kTokens>,
                                    WeightOnlyParameters, Decoder<T>::kBits, kTokens, 2, float> {
  using Base = Walk<WeightOnlyBlock, WeightOnlyParameters, Decoder<T>::kBits, kTokens, 2, float>;
  friend Base;
  using Base::fragments_, Base::read_, Base::words_, Base::scales_, Base::zeros_;
  using Base::kInSpans, Base::kUnits, Base::kWarpChunks, Base::kWarpColumns, Base::kTokenTiles;
  using Base::p_, Base::loaded_slot_, Base::piece_column_, Base::token0_, Base::block_row_;

  static constexpr bool kCopiesGroups = true, kHasExperts = true;
  static constexpr int kBits = Decoder<T>::kBits;
  static constexpr int kHeld = kInSpans ? kBits : kTilesPerWarp;  // units, at a time
  static constexpr bool kScalesSums = kTokens <= 16;
  // For x of fp32, which comes as bf16 numbers (split.cu): where all weights are such numbers.
  static constexpr bool kGivesFloats =
      kScalesSums && !kIsHalf<T> && !kRealZeros && Decoder<T>::kIsExact;

 public:
  using Base::Base;

 private:
  QK_DEVICE void start() { decoder_.start(p_.weight.table); }

  QK_DEVICE void start_groups() {
    for (auto& group : groups_) group.start();
  }

  QK_DEVICE void multiply_piece() {
    // Every so many columns that a warp takes, from the first one of a stage on, lie in one group.
    if (kWarpChunks > 1 && (p_.group_columns | piece_column_) % kWarpColumns == 0) {
      this->template multiply_stages<kWarpColumns>();
    } else if (p_.group_columns % kChunkColumns == 0) {
      this->template multiply_stages<kChunkColumns>();
    } else if (kScalesSums && p_.group_columns % (2 * kStepColumns) == 0) {
      this->template multiply_stages<2 * kStepColumns>();
    } else {
      this->template multiply_stages<kStepColumns>();
    }
  }

  template <int kRun>
  QK_DEVICE void multiply_chunks(uint32_t rest, uint32_t slot) {
    uint4 held[kHeld];
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) multiply_chunk<kRun>(c, held, rest, slot);
  }

  // `c`: which of the warp's chunks of the stage; its first column is `rest` columns into the group
  // in `slot`, which are left as those of the chunk behind it.
  template <int kRun>
  QK_DEVICE void multiply_chunk(int c, uint4 (&held)[kHeld], uint32_t& rest, uint32_t& slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two steps of 16 columns: what one ldmatrix brings
      load_units(c, half, held);
      const ptx::Shared x = fragments_[half] + read_ + c * Base::kChunkXBytes;
      uint32_t a[2][kTilesPerWarp][4], b[kTokenTiles][4];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if ((c * kChunkColumns + (2 * half + s) * kStepColumns) % kRun == 0) enter_group(slot);
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          decode(c, 2 * half + s, tile, held, a[s][tile]);
        }
        if constexpr (kScalesSums) {  // before the next step enters another group
          if (s == 0) load_x(x, b);
          multiply_step(s, a[s], b);
        }
        if (kRun < kChunkColumns && (2 * half + s + 1) * kStepColumns % kRun == 0) {
          this->pass(kRun, rest, slot);
        }
      }
      if constexpr (!kScalesSums) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, x + t * 8 * Base::kRowBytes);
#pragma unroll
          for (int tile = 0; tile < kTilesPerWarp; ++tile) {
            ptx::mma_m16n8k16<T>(sums_[tile][t], a[0][tile], b[0], b[1]);
            ptx::mma_m16n8k16<T>(sums_[tile][t], a[1][tile], b[2], b[3]);
          }
        }
      }
    }
    if (c + 1 < kWarpChunks && kRun == kChunkColumns) this->pass(kChunkColumns, rest, slot);
  }

  // What the lane has of the units that begin with half `half` of chunk c.
  QK_DEVICE void load_units(int c, int half, uint4 (&held)[kHeld]) {
    if constexpr (kInSpans) {
      if (c != 0 || half != 0) return;
#pragma unroll
      for (int u = 0; u < kBits; ++u) {
        held[u] = ptx::load_shared<uint4>(words_ + read_ + u * kUnitBytes);
      }
    } else {
      if (half != 0 && kUnits == 1) return;
#pragma unroll
      for (int tile = 0; tile < kTilesPerWarp; ++tile) {
        const int offset =
            tile * Base::kTileBytes + c * Base::kChunkBytes + half * (kUnits - 1) * kUnitBytes;
        held[tile] = ptx::load_shared<uint4>(words_ + read_ + offset);
      }
    }
  }

  // The A operand of step `step` of chunk c.
  QK_DEVICE void decode(int c, int step, int tile, const uint4 (&held)[kHeld], uint32_t (&a)[4]) {
    const uint32_t all[4] = {held[tile].x, held[tile].y, held[tile].z, held[tile].w};
    if constexpr (kInSpans) {
      const uint4 last = held[kHeld - 1];
      const uint32_t third[4] = {last.x, last.y, last.z, last.w};
      uint32_t words[2];
      span_words(all[2 * c + step / 2], third[2 * tile + c], step, words);
      groups_[tile].weights(decoder_, words, a);
    } else {
      // 4 bits: word `step`; 8 bits: two words of the unit with this step.
      groups_[tile].weights(decoder_, all + (kUnits == 1 ? step : step % 2 * 2), a);
    }
  }

  // Two steps of x, of all tokens.
  QK_DEVICE void load_x(ptx::Shared from, uint32_t (&b)[kTokenTiles][4]) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) ptx::ldmatrix_x4(b[t], from + t * 8 * Base::kRowBytes);
  }

  QK_DEVICE void multiply_step(int s, const uint32_t (&a)[kTilesPerWarp][4],
                               const uint32_t (&b)[kTokenTiles][4]) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int tile = 0; tile < kTilesPerWarp; ++tile) {
        ptx::mma_m16n8k16<T>(sums_[tile][t], a[tile], b[t][2 * s], b[t][2 * s + 1]);
      }
    }
  }

  // Makes groups_ those in `slot`. Two groups that a warp meets in turn never share one.
  QK_DEVICE void enter_group(uint32_t slot) {
    if (slot == loaded_slot_) return;
    if constexpr (kScalesSums) scale_sums();
    loaded_slot_ = slot;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const int row = static_cast<int>(slot) * Base::kBlockRows + tile * kTileRows;
      groups_[tile].template load<false>(p_.weight, scales_ + row * p_.scale_bytes,
                                         zeros_ + row * p_.zero_bytes);
    }
  }

  // Adds the sums of the group that ends to those of all.
  QK_DEVICE void scale_sums() {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          totals_[tile][t][i] =
              fmaf(sums_[tile][t][i], groups_[tile].scales[i / 2], totals_[tile][t][i]);
          sums_[tile][t][i] = 0;
        }
      }
    }
  }

  QK_DEVICE float take_total(int tile, int t, int i) {
    float& total = kScalesSums ? totals_[tile][t][i] : sums_[tile][t][i];
    float value = total;
    if constexpr (kScalesSums) value = Sums::rescaled(value, i / 2 == 1);
    total = 0;
    return value;
  }

  QK_DEVICE void end_sums() {
    if constexpr (kScalesSums) scale_sums();
  }

  // Four outputs of a token, from row `row` of the block on.
  QK_DEVICE void write(int token, int row, Four<float> sum) {
    const int64_t n = block_row_ + row, limit = p_.weight.n;
    const int64_t at = (token0_ + token) * limit + n;
    if (p_.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (ptx::within(n + i, limit)) {
          sum.values[i] += load_float(p_.bias, p_.bias_type, n + i);
        }
      }
    }
    if constexpr (kGivesFloats) {
      if (p_.y_is_float) return write_floats(static_cast<float*>(p_.y) + at, n, limit, sum);
    }
    uint16_t* y = static_cast<uint16_t*>(p_.y) + at;
    const uint2 pairs = {ptx::pack2<T>(sum.values[0], sum.values[1]),
                         ptx::pack2<T>(sum.values[2], sum.values[3])};
    if (limit % 4 == 0) {
      if (ptx::within(n, limit)) ptx::store_global<uint2>(y, pairs);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = i < 2 ? pairs.x : pairs.y;
        if (ptx::within(n + i, limit)) {
          ptx::store_global<uint16_t>(y + i, static_cast<uint16_t>(pair >> (i % 2 * 16)));
        }
      }
    }
  }

  // The same in fp32.
  static QK_DEVICE void write_floats(float* y, int64_t n, int64_t limit, const Four<float>& sum) {
    if (limit % 4 == 0) {
      if (ptx::within(n, limit)) ptx::store_global<uint4>(y, sum.bits());
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (ptx::within(n + i, limit)) ptx::store_global<float>(y + i, sum.values[i]);
      }
    }
  }

  using Sums = SumGroup<T, Decoder, kRealZeros>;
  using Groups = std::conditional_t<kScalesSums, Sums, WeightGroup<T, Decoder, kRealZeros>>;

  Decoder<T> decoder_;
  Groups groups_[kTilesPerWarp];
  float sums_[kTilesPerWarp][kTokenTiles][4] = {};                      // of a group
  float totals_[kTilesPerWarp][kScalesSums ? kTokenTiles : 1][4] = {};  // of all groups
};

// Blocks of a multiprocessor that the registers must suffice for. The sums of 64 tokens take too
// many for two, and so do those of 32 with what weights of other than 4 bits or real zero
// points need.
template <int kBits, bool kRealZeros, int kTokens>
constexpr int kResidentBlocks =
    kTokens == 64 || (kTokens == 32 && (kBits != 4 || kRealZeros)) ? 1 : 2;

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, (kResidentBlocks<Decoder<T>::kBits, kRealZeros, kTokens>))
    weight_only_mma_kernel(const QK_GRID_CONSTANT WeightOnlyParameters parameters) {
  ptx::start_next_kernel();
  WeightOnlyBlock<T, Decoder, kRealZeros, kTokens>(parameters, ptx::shared_memory()).run();
}

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
const char* launch_tokens(const WeightOnlyParameters& parameters, unsigned blocks, int shared_bytes,
                          Stream stream) {
  return launch_early(weight_only_mma_kernel<T, Decoder, kRealZeros, kTokens>, dim3{blocks, 1, 1},
                      kThreads, shared_bytes, stream, parameters);
}

template <class T, template <class> class Decoder, bool kRealZeros>
const char* launch_type(const WeightOnlyParameters& parameters, int tokens, unsigned blocks,
                        int shared_bytes, Stream stream) {
  switch (tokens) {
    case 8:
      return launch_tokens<T, Decoder, kRealZeros, 8>(parameters, blocks, shared_bytes, stream);
    case 16:
      return launch_tokens<T, Decoder, kRealZeros, 16>(parameters, blocks, shared_bytes, stream);
    case 32:
      return launch_tokens<T, Decoder, kRealZeros, 32>(parameters, blocks, shared_bytes, stream);
    default:
      return launch_tokens<T, Decoder, kRealZeros, 64>(parameters, blocks, shared_bytes, stream);
  }
}

template <template <class> class Decoder, bool kRealZeros>
const char* launch_decoder(const WeightOnlyParameters& parameters, FloatType x_type, int tokens,
                           unsigned blocks, int shared_bytes, Stream stream) {
  return x_type == FloatType::kHalf ? launch_type<Half, Decoder, kRealZeros>(
                                          parameters, tokens, blocks, shared_bytes, stream)
                                    : launch_type<Bfloat16, Decoder, kRealZeros>(
                                          parameters, tokens, blocks, shared_bytes, stream);
}

}  // namespace qkernels
