// y [M, N] = x [M, K] @ w [N, K].T + b, as Y^T = W X^T on tensor cores, with W dequantized in
// registers.
//
// The weight is the A operand of mma.m16n8k16, so that a single token costs eight columns and not
// sixteen rows, and the tokens fill the N side in tiles of 8.
//
//     block      kTokens tokens x (32 * warps_n) rows of the weight, one of split_k parts of K
//     warp       32 rows (two tiles of 16, which share each fragment of x), and one or two of each
//                stage's chunks of 64 columns
//     stage      what a block brings to shared memory at a time: the chunks of warps_k warps
//
// Asynchronous copies keep `stages - 1` stages under way. A lane copies and reads back its own 16
// bytes of weights, so these need no swizzle and no barrier; x is shared by the block and swizzled
// by 16-byte pieces, so that neither the copies nor ldmatrix conflict.
//
//     shared memory:  [stages] { x [kTokens][stage columns] | words [8 warps][2 tiles][chunks] }
//                     scales [slots][block rows] | zeros [slots][block rows]
//     then, over it:  sums [warps_k][kTokens][block rows + 4] fp32
//
// A group's scales are copied once, with the first stage that reaches into the group, to slot
// g % slots; there are as many slots as groups that the stages under way can touch.
//
// The sums of a block's warps along K, and then of the blocks along K, are added in a fixed order:
// the last block of a tile to arrive adds what all of them left in global memory. So the same call
// gives the same bits.

#pragma once

#include "cuda/weight_only/config.h"
#include "cuda/weight_only/parameters.cuh"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTilesPerWarp = 2;
constexpr int kNoEnd = 0x7fffffff;  // of the last group
constexpr int kPadding = 4;  // floats: lets the fragments of sums be stored without conflicts

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
class WeightOnlyBlock {
 public:
  static constexpr WeightOnlyConfig kShape = {kTokens, 1, 2};  // any split_k and stages
  static constexpr int kWarpsN = kShape.warps_n();
  static constexpr int kWarpsK = kShape.warps_k();
  static constexpr int kBlockRows = kShape.block_rows();
  static_assert(kWarpsN * kWarpsK == kWarps && kBlockRows == kWarpsN * kTilesPerWarp * kTileRows);
  static constexpr int kBits = Decoder<T>::kBits;
  static constexpr int kWarpChunks = kShape.warp_chunks(kBits);
  static constexpr int kStageChunks = kShape.stage_chunks(kBits);
  static constexpr int kStageColumns = kStageChunks * kChunkColumns;
  static constexpr int kRowBytes = kStageColumns * 2;  // of x in shared memory
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kUnits = kChunkColumns / kUnitColumns<kBits>;  // of a chunk
  static constexpr int kChunkBytes = kUnits * kUnitBytes;             // of a tile
  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kXCopies = kTokens * kPieces / kThreads;  // of a thread and stage
  static constexpr int kTileBytes = kWarpChunks * kChunkBytes;
  static constexpr int kStageBytes = kXBytes + kWarps * kTilesPerWarp * kTileBytes;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kSumRow = kBlockRows + kPadding;

  QK_DEVICE WeightOnlyBlock(const WeightOnlyParameters& parameters, unsigned char* shared)
      : p_(parameters), shared_(shared) {
    lane_ = threadIdx.x % kLanes;
    warp_ = threadIdx.x / kLanes;
    warp_n_ = warp_ % kWarpsN;
    warp_k_ = warp_ / kWarpsN;
    block_row_ = static_cast<int64_t>(blockIdx.x) * kBlockRows;
    token0_ = static_cast<int64_t>(blockIdx.z) * kTokens;
    first_chunk_ = blockIdx.y * p_.chunks_per_split;
    last_chunk_ = min_of(first_chunk_ + p_.chunks_per_split, p_.chunks);
    end_column_ = last_chunk_ * kChunkColumns;
    const int64_t warp_row = block_row_ + warp_n_ * kTilesPerWarp * kTileRows;
    // A warp beyond the last row has no chunks.
    warp_end_ = warp_row < p_.rows ? last_chunk_ : 0;

    copied_chunk_ = first_chunk_ + warp_k_ * kWarpChunks;
    chunk_ = copied_chunk_;
    const int64_t unit = warp_row / kTileRows * p_.chunks + copied_chunk_;
    weights_ = static_cast<const unsigned char*>(p_.weight.words) + unit * kChunkBytes + lane_ * 16;
    words_at_ = kXBytes + warp_ * kTilesPerWarp * kTileBytes + lane_ * 16;
    // Piece lane / 8 of token lane % 8 in the warp's first chunk; the second half of a chunk lies 4
    // pieces on, which the swizzle makes bit 6 of the address.
    fragment_at_ = lane_ % 8 * kRowBytes + warp_k_ * kWarpChunks * kChunkColumns * 2 +
                   swizzled(lane_ / 8, lane_ % 8) * 16;
    fine_groups_ = p_.weight.group_size % kChunkColumns != 0;
    start_activations();
    start_groups();
  }

  QK_DEVICE void run() {
    const int steps = (last_chunk_ - first_chunk_ + kStageChunks - 1) / kStageChunks;
    decoder_.start(p_.weight.table);
    for (auto& group : groups_) group.start();
    for (int step = 0; step < p_.stages - 1; ++step) {
      if (step < steps) copy_stage();
      ptx::copy_async_commit();
    }
    int left = steps - (p_.stages - 1);  // stages that are still to be copied
    for (int step = 0; step < steps; ++step) {
      wait_for_stage();
      // Every warp's copies of this stage have landed, and every warp is done with the stage
      // before, whose place the next copies take.
      ptx::sync_threads();
      if (left > 0) copy_stage();
      --left;
      ptx::copy_async_commit();
      multiply();
    }
    ptx::sync_threads();  // the sums take the place of the stages, whose copies all have landed
    finish();
  }

 private:
  static QK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  // Where piece `piece` of a row of x lies in it.
  static QK_DEVICE int swizzled(int piece, int token) {
    return (piece & ~7) | ((piece ^ token) & 7);
  }

  // The number of groups of copies to leave under way is a constant of the instruction.
  QK_DEVICE void wait_for_stage() {
    if (p_.stages == 4) {
      ptx::copy_async_wait<2>();
    } else if (p_.stages == 3) {
      ptx::copy_async_wait<1>();
    } else if (p_.stages == 2) {
      ptx::copy_async_wait<0>();
    } else if (p_.stages == 5) {
      ptx::copy_async_wait<3>();
    } else {
      ptx::copy_async_wait<4>();
    }
  }

  // Divisions stand here and in start_groups(), once a block: the loop only adds and compares.
  QK_DEVICE void start_activations() {
    column_ = first_chunk_ * kChunkColumns;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const int index = i * kThreads + threadIdx.x;
      const int token = index / kPieces, piece = index % kPieces;
      x_[i] = p_.x + ((token0_ + token) * p_.x_stride + column_ + piece * 8) * 2;
      x_at_[i] = token * kRowBytes + swizzled(piece, token) * 16;
      // A column that a token beyond the last one never reaches.
      x_limit_[i] = ptx::within(token0_ + token, p_.m)
                        ? min_of(end_column_, static_cast<int>(p_.weight.k)) - piece * 8
                        : 0;
    }
  }

  QK_DEVICE void start_groups() {
    const int size = static_cast<int>(p_.weight.group_size);
    scales_at_ = p_.stages * kStageBytes;
    zeros_at_ = scales_at_ + p_.slots * kBlockRows * p_.scale_bytes;
    next_group_ = first_chunk_ * kChunkColumns / size;
    next_edge_ = next_group_ * size;
    // Before the first group, so that the first chunk enters it.
    group_ = next_group_ - 1;
    group_end_ = next_edge_;
    // Half of the threads copy scales, half zero points; a thread copies the same 16 bytes of every
    // groups_at_once_-th group.
    constexpr int kHalf = kThreads / 2;
    const bool is_scale = threadIdx.x < kHalf;
    const int bytes = is_scale ? p_.scale_bytes : p_.zero_bytes;
    const int pieces = kBlockRows * bytes / 16;
    if (pieces == 0) return;
    const int index = threadIdx.x % kHalf, offset = index % pieces * 16;
    groups_at_once_ = kHalf / pieces;
    my_group_ = index / pieces;
    const int64_t from = block_row_ * bytes + offset;
    copies_groups_ = ptx::within(from, p_.rows * bytes);
    group_source_ =
        static_cast<const unsigned char*>(is_scale ? p_.weight.scales : p_.weight.zeros);
    group_source_ += from;
    group_bytes_ = p_.rows * bytes;
    slot_bytes_ = kBlockRows * bytes;
    group_target_ = (is_scale ? scales_at_ : zeros_at_) + offset;
  }

  QK_DEVICE void copy_stage() {
    copy_weights();
    copy_activations();
    copy_groups(min_of(column_ + kStageColumns, end_column_));
    column_ += kStageColumns;
    write_ = next_stage(write_);
  }

  QK_DEVICE int next_stage(int stage) const {
    return stage + kStageBytes == scales_at_ ? 0 : stage + kStageBytes;
  }

  QK_DEVICE void copy_weights() {
    const int64_t row_bytes = static_cast<int64_t>(p_.chunks) * kChunkBytes;  // of a row of tiles
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) {
      if (copied_chunk_ + c >= warp_end_) break;
#pragma unroll
      for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const int offset = c * kChunkBytes + u * kUnitBytes;
          ptx::copy_async_16(shared_ + write_ + words_at_ + tile * kTileBytes + offset,
                             weights_ + tile * row_bytes + offset, true);
        }
      }
    }
    copied_chunk_ += kStageChunks;
    weights_ += kStageChunks * kChunkBytes;
  }

  QK_DEVICE void copy_activations() {
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      ptx::copy_async_16(shared_ + write_ + x_at_[i], x_[i], ptx::within(column_, x_limit_[i]));
      x_[i] += kRowBytes;
    }
  }

  // The groups that begin before column `end`, and have not been copied yet.
  QK_DEVICE void copy_groups(int end) {
    const int size = static_cast<int>(p_.weight.group_size), first = next_group_;
    while (next_edge_ < end && next_group_ < p_.groups) {
      ++next_group_;
      next_edge_ += size;
    }
    const int count = next_group_ - first;
    if (copies_groups_) {
      for (int i = my_group_; i < count; i += groups_at_once_) {
        const int slot = next_slot_ + i < p_.slots ? next_slot_ + i : next_slot_ + i - p_.slots;
        ptx::copy_async_16(shared_ + group_target_ + slot * slot_bytes_,
                           group_source_ + (first + i) * group_bytes_, true);
      }
    }
    next_slot_ += count;
    if (next_slot_ >= p_.slots) next_slot_ -= p_.slots;
  }

  QK_DEVICE void multiply() {
    for (int c = 0; c < kWarpChunks; ++c) {
      if (chunk_ + c < warp_end_) multiply_chunk((chunk_ + c) * kChunkColumns, c);
    }
    chunk_ += kStageChunks;
    read_ = next_stage(read_);
  }

  // `c`: which of the warp's chunks of the stage.
  QK_DEVICE void multiply_chunk(int column, int c) {
    const unsigned char* const stage = shared_ + read_;
    uint4 held[kTilesPerWarp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two steps of 16 columns: what one ldmatrix brings
      uint32_t a[2][kTilesPerWarp][4];
      if (half == 0 || kUnits == 2) {
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          held[tile] = ptx::load_shared<uint4>(stage + words_at_ + tile * kTileBytes +
                                               c * kChunkBytes + half * (kUnits - 1) * kUnitBytes);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int first_column = (2 * half + s) * kStepColumns;
        if (first_column == 0 || fine_groups_) enter_group(column + first_column);
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          const uint32_t all[4] = {held[tile].x, held[tile].y, held[tile].z, held[tile].w};
          // 4 bits: word 2 * half + s; 8 bits: words 2s and 2s + 1 of unit `half`.
          const int first = kUnits == 1 ? 2 * half + s : 2 * s;
          groups_[tile].weights(decoder_, all + first, a[s][tile]);
        }
      }
      const unsigned char* const row = stage + (fragment_at_ ^ half * 64) + c * kChunkColumns * 2;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, row + t * 8 * kRowBytes);
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          ptx::mma_m16n8k16<T>(sums_[tile][t], a[0][tile], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums_[tile][t], a[1][tile], b[2], b[3]);
        }
      }
    }
  }

  // Makes groups_ those of the columns from `column` on.
  QK_DEVICE void enter_group(int column) {
    if (column < group_end_) return;
    do {
      ++group_;
      group_end_ =
          group_ + 1 < p_.groups ? group_end_ + static_cast<int>(p_.weight.group_size) : kNoEnd;
      if (++group_slot_ == p_.slots) group_slot_ = 0;
    } while (column >= group_end_);
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const int row = (warp_n_ * kTilesPerWarp + tile) * kTileRows + lane_ / 4 * 2;
      const int index = group_slot_ * kBlockRows + row;
      groups_[tile].template load<false>(p_.weight, shared_ + scales_at_ + index * p_.scale_bytes,
                                         shared_ + zeros_at_ + index * p_.zero_bytes);
    }
  }

  // sums [warps_k][kTokens][kSumRow] in shared memory
  QK_DEVICE float* sum_at(int part, int token, int row) {
    return reinterpret_cast<float*>(shared_) + (part * kTokens + token) * kSumRow + row;
  }

  QK_DEVICE void finish() {
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (warp_n_ * kTilesPerWarp + tile) * kTileRows + i / 2 * 8 + lane_ / 4;
          const int token = t * 8 + lane_ % 4 * 2 + i % 2;
          ptx::store_shared<float>(sum_at(warp_k_, token, row), sums_[tile][t][i]);
        }
      }
    }
    ptx::sync_threads();
    const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
    float* partials = p_.partials + tile * p_.split_k * kTokens * kBlockRows;
    for (int i = threadIdx.x; i < kTokens * kBlockRows / 4; i += kThreads) {
      const int token = i / (kBlockRows / 4), row = i % (kBlockRows / 4) * 4;
      if (!ptx::within(token0_ + token, p_.m)) continue;
      Four sum = load_four(sum_at(0, token, row));
#pragma unroll
      for (int part = 1; part < kWarpsK; ++part) sum.add(load_four(sum_at(part, token, row)));
      if (p_.split_k == 1) {
        write(token, row, sum);
      } else {
        float* target = partials + (blockIdx.y * kTokens + token) * kBlockRows + row;
        ptx::store_global<uint4>(target, sum.bits());
      }
    }
    if (p_.split_k > 1) add_partials(tile, partials);
  }

  // The last block of the tile to get here adds the sums of all.
  QK_DEVICE void add_partials(int64_t tile, const float* partials) {
    ptx::thread_fence();  // this block's sums before its count
    ptx::sync_threads();
    auto* arrived = sum_at(kWarpsK, 0, 0);  // behind the sums
    if (threadIdx.x == 0) {
      ptx::store_shared<uint32_t>(arrived, ptx::count_block(p_.counters + tile));
    }
    ptx::sync_threads();
    if (ptx::load_shared<uint32_t>(arrived) != static_cast<uint32_t>(p_.split_k - 1)) return;
    ptx::thread_fence();  // the other blocks' counts before their sums
    if (threadIdx.x == 0) ptx::store_global<uint32_t>(p_.counters + tile, 0);
    for (int i = threadIdx.x; i < kTokens * kBlockRows / 4; i += kThreads) {
      const int token = i / (kBlockRows / 4), row = i % (kBlockRows / 4) * 4;
      if (!ptx::within(token0_ + token, p_.m)) continue;
      Four sum = {{0, 0, 0, 0}};
      for (int split = 0; split < p_.split_k; ++split) {
        const float* source = partials + (split * kTokens + token) * kBlockRows + row;
        sum.add(Four::of(ptx::load_global_written<uint4>(source)));
      }
      write(token, row, sum);
    }
  }

  struct Four {
    float values[4];

    static QK_DEVICE Four of(uint4 bits) {
      return {{ptx::as_float(bits.x), ptx::as_float(bits.y), ptx::as_float(bits.z),
               ptx::as_float(bits.w)}};
    }
    QK_DEVICE uint4 bits() const {
      return {ptx::as_bits(values[0]), ptx::as_bits(values[1]), ptx::as_bits(values[2]),
              ptx::as_bits(values[3])};
    }
    QK_DEVICE void add(const Four& other) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] += other.values[i];
    }
  };

  static QK_DEVICE Four load_four(const float* sums) {
    return Four::of(ptx::load_shared<uint4>(sums));
  }

  // Four outputs of a token, from row `row` of the block on.
  QK_DEVICE void write(int token, int row, Four sum) {
    const int64_t n = block_row_ + row, limit = p_.weight.n;
    uint16_t* y = p_.y + (token0_ + token) * limit + n;
    if (p_.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (ptx::within(n + i, limit)) {
          sum.values[i] += load_float(p_.bias, p_.bias_type, n + i);
        }
      }
    }
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

  const WeightOnlyParameters& p_;
  unsigned char* shared_;
  int lane_, warp_, warp_n_, warp_k_;
  int64_t block_row_, token0_;
  int first_chunk_, last_chunk_, end_column_;
  int warp_end_;

  // What is to be copied next, and where; offsets of shared memory are in bytes.
  int column_, copied_chunk_, write_ = 0;
  const unsigned char* weights_;
  int words_at_;
  const unsigned char* x_[kXCopies];
  int x_at_[kXCopies], x_limit_[kXCopies];
  int next_group_, next_edge_, next_slot_ = 0;  // next_edge_: its first column
  int my_group_, groups_at_once_, group_target_, slot_bytes_;
  const unsigned char* group_source_;
  int64_t group_bytes_;
  bool copies_groups_ = false;

  // What is to be multiplied next.
  int read_ = 0;
  int scales_at_, zeros_at_;
  int chunk_, fragment_at_;
  int group_, group_end_, group_slot_ = -1;
  bool fine_groups_;
  Decoder<T> decoder_;
  Group<T, Decoder, kRealZeros> groups_[kTilesPerWarp];
  float sums_[kTilesPerWarp][kTokenTiles][4] = {};
};

// Blocks of a multiprocessor that the registers must suffice for. The sums of 64 tokens take too
// many for two, and so do those of 32 with what real zero points need.
template <bool kRealZeros, int kTokens>
constexpr int kResidentBlocks = kTokens == 64 || (kTokens == 32 && kRealZeros) ? 1 : 2;

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, (kResidentBlocks<kRealZeros, kTokens>))
    weight_only_mma_kernel(const QK_GRID_CONSTANT WeightOnlyParameters parameters) {
  WeightOnlyBlock<T, Decoder, kRealZeros, kTokens>(parameters, ptx::shared_memory()).run();
}

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
const char* launch_tokens(const WeightOnlyParameters& parameters, dim3 grid, int shared_bytes,
                          Stream stream) {
  return launch(weight_only_mma_kernel<T, Decoder, kRealZeros, kTokens>, grid, kThreads,
                shared_bytes, stream, parameters);
}

template <class T, template <class> class Decoder, bool kRealZeros>
const char* launch_type(const WeightOnlyParameters& parameters, int tokens, dim3 grid,
                        int shared_bytes, Stream stream) {
  switch (tokens) {
    case 8: return launch_tokens<T, Decoder, kRealZeros, 8>(parameters, grid, shared_bytes, stream);
    case 16:
      return launch_tokens<T, Decoder, kRealZeros, 16>(parameters, grid, shared_bytes, stream);
    case 32:
      return launch_tokens<T, Decoder, kRealZeros, 32>(parameters, grid, shared_bytes, stream);
    default:
      return launch_tokens<T, Decoder, kRealZeros, 64>(parameters, grid, shared_bytes, stream);
  }
}

template <template <class> class Decoder, bool kRealZeros>
const char* launch_decoder(const WeightOnlyParameters& parameters, FloatType x_type, int tokens,
                           dim3 grid, int shared_bytes, Stream stream) {
  return x_type == FloatType::kHalf ? launch_type<Half, Decoder, kRealZeros>(
                                          parameters, tokens, grid, shared_bytes, stream)
                                    : launch_type<Bfloat16, Decoder, kRealZeros>(
                                          parameters, tokens, grid, shared_bytes, stream);
}

}  // namespace qkernels
