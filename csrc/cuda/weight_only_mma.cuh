// Y^T = W X^T on tensor cores, with W dequantized in registers: y [M, N] = x [M, K] @ w [N, K].T +
// b
//
// The weight is the A operand of mma.m16n8k16, so that a single token costs eight columns and not
// sixteen rows, and the tokens fill the N side in tiles of 8.
//
//     block      kTokens tokens x (32 * warps_n) rows of the weight, one of split_k parts of K
//     warp       32 rows (two tiles of 16, which share each fragment of x), and every warps_k-th
//                chunk of 64 columns
//     stage      what a block brings to shared memory at a time: 64 * warps_k columns
//
// Asynchronous copies keep `stages - 1` stages under way. A lane copies and reads back its own 16
// bytes of weights, so these need no swizzle and no barrier; x is shared by the block and swizzled
// by 16-byte pieces, so that neither the copies nor ldmatrix conflict.
//
//     shared memory:  [stages] { x [kTokens][stage columns] | words [8 warps][2 tiles][chunk] }
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

#include "cuda/groups.cuh"
#include "cuda/weight_only_launch.cuh"

namespace qkernels {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTilesPerWarp = 2;
constexpr int kPadding = 4;  // floats: lets the fragments of sums be stored without conflicts

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
class WeightOnlyBlock {
 public:
  static constexpr int kWarpsN = kTokens <= 16 ? 2 : kTokens == 32 ? 4 : 8;
  static constexpr int kWarpsK = kWarps / kWarpsN;
  static constexpr int kBlockRows = kWarpsN * kTilesPerWarp * kTileRows;
  static constexpr int kStageColumns = kWarpsK * kChunkColumns;
  static constexpr int kRowBytes = kStageColumns * 2;  // of x in shared memory
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int kBits = Decoder<T>::kBits;
  static constexpr int kUnits = kChunkColumns / kUnitColumns<kBits>;  // of a chunk
  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWarps * kTilesPerWarp * kUnits * kUnitBytes;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kSumRow = kBlockRows + kPadding;

  QK_DEVICE WeightOnlyBlock(const WeightOnlyParameters& parameters, unsigned char* shared)
      : p_(parameters), shared_(shared) {
    scales_ = shared + p_.stages * kStageBytes;
    zeros_ = scales_ + p_.slots * kBlockRows * p_.scale_bytes;
    lane_ = threadIdx.x % kLanes;
    warp_ = threadIdx.x / kLanes;
    warp_n_ = warp_ % kWarpsN;
    warp_k_ = warp_ / kWarpsN;
    block_row_ = static_cast<int64_t>(blockIdx.x) * kBlockRows;
    token0_ = static_cast<int64_t>(blockIdx.z) * kTokens;
    first_chunk_ = blockIdx.y * p_.chunks_per_split;
    last_chunk_ = min_of(first_chunk_ + p_.chunks_per_split, p_.chunks);
    warp_row_ = block_row_ + warp_n_ * kTilesPerWarp * kTileRows;
    has_rows_ = warp_row_ < p_.rows;
  }

  QK_DEVICE void run() {
    const int steps = (last_chunk_ - first_chunk_ + kWarpsK - 1) / kWarpsK;
    decoder_.start(p_.weight.table);
    for (auto& group : groups_) group.start();
    for (int step = 0; step < p_.stages - 1; ++step) {
      if (step < steps) copy_stage(step);
      ptx::copy_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      wait_for_stage();
      // Every warp's copies of this stage have landed, and every warp is done with the stage
      // before, whose place the next copies take.
      ptx::sync_threads();
      const int next = step + p_.stages - 1;
      if (next < steps) copy_stage(next);
      ptx::copy_async_commit();
      multiply(step);
    }
    ptx::sync_threads();  // the sums take the place of the stages, whose copies all have landed
    finish();
  }

 private:
  static QK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  static QK_DEVICE int swizzled(int piece, int token) {
    return (piece & ~7) | ((piece ^ token) & 7);
  }

  QK_DEVICE unsigned char* stage(int step) { return shared_ + step % p_.stages * kStageBytes; }

  QK_DEVICE unsigned char* words(int step, int tile) {
    return stage(step) + kXBytes + (warp_ * kTilesPerWarp + tile) * kUnits * kUnitBytes +
           lane_ * 16;
  }

  // The number of groups to leave under way is a constant of the instruction.
  QK_DEVICE void wait_for_stage() {
    switch (p_.stages) {
      case 2: ptx::copy_async_wait<0>(); break;
      case 3: ptx::copy_async_wait<1>(); break;
      case 4: ptx::copy_async_wait<2>(); break;
      case 5: ptx::copy_async_wait<3>(); break;
      default: ptx::copy_async_wait<4>(); break;
    }
  }

  QK_DEVICE void copy_stage(int step) {
    const int chunk = first_chunk_ + step * kWarpsK;
    copy_weights(step, chunk + warp_k_);
    copy_activations(step, chunk);
    copy_groups(step, chunk);
  }

  QK_DEVICE void copy_weights(int step, int chunk) {
    if (!has_rows_ || chunk >= last_chunk_) return;
    const auto* source = static_cast<const unsigned char*>(p_.weight.words);
    const int64_t units = static_cast<int64_t>(p_.chunks) * kUnits;  // of a row of tiles
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const int64_t unit =
          (warp_row_ / kTileRows + tile) * units + static_cast<int64_t>(chunk) * kUnits;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        ptx::copy_async_16(words(step, tile) + u * kUnitBytes,
                           source + (unit + u) * kUnitBytes + lane_ * 16, true);
      }
    }
  }

  QK_DEVICE void copy_activations(int step, int chunk) {
    const int64_t end = static_cast<int64_t>(last_chunk_) * kChunkColumns;
    const int64_t limit = end < p_.weight.k ? end : p_.weight.k;
    for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
      const int token = i / kPieces, piece = i % kPieces;
      const int64_t column = static_cast<int64_t>(chunk) * kChunkColumns + piece * 8;
      const bool valid = ptx::within(token0_ + token, p_.m) && ptx::within(column, limit);
      ptx::copy_async_16(stage(step) + token * kRowBytes + swizzled(piece, token) * 16,
                         p_.x + ((token0_ + token) * p_.x_stride + column) * 2, valid);
    }
  }

  QK_DEVICE void copy_groups(int step, int chunk) {
    const int size = static_cast<int>(p_.weight.group_size);
    const int begin = chunk * kChunkColumns;
    const int end = min_of(chunk + kWarpsK, last_chunk_) * kChunkColumns;
    // The group that reaches into a later stage came with an earlier one.
    const int first = step == 0 ? begin / size : (begin + size - 1) / size;
    const int last = min_of((end + size - 1) / size, p_.groups);
    copy_group_rows(p_.weight.scales, scales_, p_.scale_bytes, first, last);
    if (p_.zero_bytes != 0) {
      copy_group_rows(p_.weight.zeros, zeros_, p_.zero_bytes, first, last);
    }
  }

  QK_DEVICE void copy_group_rows(const void* source, unsigned char* target, int bytes, int first,
                                 int last) {
    const int pieces = kBlockRows * bytes / 16;
    const auto* from = static_cast<const unsigned char*>(source);
    for (int i = threadIdx.x; i < (last - first) * pieces; i += kThreads) {
      const int group = first + i / pieces, offset = i % pieces * 16;
      if (!ptx::within(block_row_ * bytes + offset, p_.rows * bytes)) continue;
      ptx::copy_async_16(target + group % p_.slots * kBlockRows * bytes + offset,
                         from + (group * p_.rows + block_row_) * bytes + offset, true);
    }
  }

  QK_DEVICE void multiply(int step) {
    const int chunk = first_chunk_ + step * kWarpsK + warp_k_;
    if (!has_rows_ || chunk >= last_chunk_) return;
    const int size = static_cast<int>(p_.weight.group_size);
    int group = min_of(chunk * kChunkColumns / size, p_.groups - 1);
    load_group(group);
    uint4 held[kTilesPerWarp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two steps of 16 columns: what one ldmatrix brings
      uint32_t a[2][kTilesPerWarp][4];
#pragma unroll
      for (int tile = 0; tile < kTilesPerWarp; ++tile) {
        if (half == 0 || kUnits == 2) {
          held[tile] =
              ptx::load_shared<uint4>(words(step, tile) + half * (kUnits - 1) * kUnitBytes);
        }
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int column = chunk * kChunkColumns + (2 * half + s) * kStepColumns;
        if ((half > 0 || s > 0) && column >= (group + 1) * size && group + 1 < p_.groups) {
          load_group(++group);
        }
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          const uint32_t all[4] = {held[tile].x, held[tile].y, held[tile].z, held[tile].w};
          // 4 bits: word 2 * half + s; 8 bits: words 2s and 2s + 1 of unit `half`.
          const int first = kUnits == 1 ? 2 * half + s : 2 * s;
          groups_[tile].weights(decoder_, all + first, a[s][tile]);
        }
      }
      const int piece = warp_k_ * (kChunkColumns / 8) + half * 4 + lane_ / 8;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int token = t * 8 + lane_ % 8;
        uint32_t b[4];
        ptx::ldmatrix_x4(b, stage(step) + token * kRowBytes + swizzled(piece, token) * 16);
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
          ptx::mma_m16n8k16<T>(sums_[tile][t], a[0][tile], b[0], b[1]);
          ptx::mma_m16n8k16<T>(sums_[tile][t], a[1][tile], b[2], b[3]);
        }
      }
    }
  }

  QK_DEVICE void load_group(int group) {
    const int slot = group % p_.slots;
#pragma unroll
    for (int tile = 0; tile < kTilesPerWarp; ++tile) {
      const int row = (warp_n_ * kTilesPerWarp + tile) * kTileRows + lane_ / 4 * 2;
      const int index = slot * kBlockRows + row;
      groups_[tile].template load<false>(p_.weight, scales_ + index * p_.scale_bytes,
                                         zeros_ + index * p_.zero_bytes);
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
  unsigned char *shared_, *scales_, *zeros_;
  int lane_, warp_, warp_n_, warp_k_;
  int64_t block_row_, token0_, warp_row_;
  int first_chunk_, last_chunk_;
  bool has_rows_;
  Decoder<T> decoder_;
  Group<T, Decoder, kRealZeros> groups_[kTilesPerWarp];
  float sums_[kTilesPerWarp][kTokenTiles][4] = {};
};

// Two blocks a multiprocessor, but for 64 tokens, whose sums take twice the registers.
template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, kTokens == 64 ? 1 : 2)
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
