// dx [M, K] = dy [M, N] @ w [N, K], with W dequantized in registers: the gradient of x.
//
// The weight lies as the A operand of Y^T = W X^T (weights/fragment.cuh): a lane's pairs run along
// K. Here sums run along N, and so must pairs: movmatrix turns each 8x8 of a step, four for its 16
// rows by 16 columns. What it gives is both the A operand of dX^T = W^T dY^T and the B operand of
// dX = dY W, for as many mma and ldmatrix. As B, which is taken, sums come in pairs along K, in
// which dx is stored; as A they would have to be turned once more.
//
//     tile       kTokens tokens x 256 columns of the weight
//     block      a tile over all N, or a part of it
//     warp       32 columns, two steps, of all the block's rows and tokens
//     stage      64 rows of the weight, with their scales, and as many columns of dy
//
// Groups lie along K, and so no scale can be taken out of a sum: weights are scaled before they are
// multiplied, and equal dequantize() bit for bit.
//
// Asynchronous copies keep kStages - 1 stages under way. dy is swizzled by 16-byte pieces; two
// warps share a lane's 16 bytes of 4-bit weights.
//
//     shared memory:  [kStages] { dy [kTokens][64] | words [4 tiles][4 chunks]
//                                 | scales [slots][64] | zeros [slots][64] }
//     then, over it:  dx [8 warps][kTokens][32] | whether this block is the last
//
// The blocks of a tile leave their sums in global memory, where the last one to arrive adds them in
// the order of N: the same call gives the same bits.

#pragma once

#include "cuda/weight_only/grad_parameters.cuh"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
class GradBlock {
 public:
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kSteps = 2;  // of 16 columns, of a warp
  static constexpr int kWarpColumns = kSteps * kStepColumns;
  static_assert(kWarps * kWarpColumns == kGradBlockColumns);
  static constexpr int kBits = Decoder<T>::kBits;
  static constexpr int kStages = kBits == 4 ? 4 : 3;
  static constexpr int kRowTiles = kGradStageRows / kTileRows;
  static constexpr int kRowBytes = kGradStageRows * 2;  // of dy in shared memory
  static constexpr int kDyPieces = kRowBytes / 16;
  static constexpr int kDyBytes = kTokens * kRowBytes;
  static constexpr int kBlockChunks = kGradBlockColumns / kChunkColumns;
  static constexpr int kChunkBytes = kChunkColumns / kUnitColumns<kBits> * kUnitBytes;
  static constexpr int kTileBytes = kBlockChunks * kChunkBytes;  // of 16 rows
  static constexpr int kWordBytes = kRowTiles * kTileBytes;
  static constexpr int kWordCopies = kWordBytes / 16 / kThreads;  // of a thread and stage
  static constexpr int kTileCopies = kTileBytes / 16;             // of all threads
  static constexpr int kTokenTiles = kTokens / 16;
  static constexpr int kEights = kWarpColumns / 8;  // columns of a product
  static constexpr int kDxRowBytes = kWarpColumns * 2;
  static constexpr int kDxBytes = kTokens * kDxRowBytes;  // of a warp

  // Of a stage, whatever its groups: 16 columns each, with scales and zero points of fp32.
  static constexpr int kLeastBytes = kDyBytes + kWordBytes;
  static constexpr int kMostBytes = kLeastBytes + kGradBlockColumns / 16 * kGradStageRows * 8;
  static_assert(kStages * kMostBytes <= 99 * 1024, "what a block has on sm_86, sm_89 and sm_120");
  static_assert(kWarps * kDxBytes + 4 <= kStages * kLeastBytes, "dx takes the place of the stages");

  static int stage_bytes(const GradParameters& p) {
    return kLeastBytes + p.slots * kGradStageRows * (p.scale_bytes + p.zero_bytes);
  }

  QK_DEVICE GradBlock(const GradParameters& parameters, ptx::Shared shared)
      : p_(parameters), shared_(shared) {
    lane_ = threadIdx.x % kLanes;
    warp_ = threadIdx.x / kLanes;
  }

  QK_DEVICE void run() {
    start();
    decoder_.start(p_.weight.table);
    for (int stage = 0; stage < kStages - 1; ++stage) copy_stage(stage * p_.stage_bytes);
    int read = 0, write = (kStages - 1) * p_.stage_bytes;
    for (int stage = 0; stage < stages_; ++stage) {
      ptx::copy_async_wait<kStages - 2>();
      // Every warp's copies of this stage have landed, and every warp is done with the stage
      // before, whose place the next copies take. Behind the last row they bring zeros.
      ptx::sync_threads();
      copy_stage(write);
      multiply(read);
      write = read;
      read = read == (kStages - 1) * p_.stage_bytes ? 0 : read + p_.stage_bytes;
    }
    ptx::copy_async_wait<0>();
    ptx::sync_threads();  // dx takes the place of the stages
    if (p_.parts > 1 && !add_parts()) return;
    write_dx();
  }

 private:
  static constexpr int kNothing = 0x7fffffff;  // the row of a thread that has nothing to copy

  // Where piece `piece` of a row of dy lies in it.
  static QK_DEVICE int swizzled(int piece, int token) { return piece ^ (token & 7); }

  // Where piece `piece` of a token's 32 columns of dx lies in a warp's: two tokens fill all banks.
  static QK_DEVICE int dx_at(int token, int piece) {
    return token * kDxRowBytes + (piece ^ (token / 2 & 3)) * 16;
  }

  QK_DEVICE void start() {
    tile_ = static_cast<int>(blockIdx.x) / p_.parts;
    part_ = static_cast<int>(blockIdx.x) - tile_ * p_.parts;
    const int column_tile = tile_ / p_.token_tiles;
    token0_ = static_cast<int64_t>(tile_ - column_tile * p_.token_tiles) * kTokens;
    column0_ = column_tile * kGradBlockColumns;
    const int share = p_.stages / p_.parts, longer = p_.stages % p_.parts;
    const int first = part_ * share + (part_ < longer ? part_ : longer);
    stages_ = share + (part_ < longer ? 1 : 0);
    const int row = first * kGradStageRows;
    const int end = (first + stages_) * kGradStageRows, n = static_cast<int>(p_.weight.n);
    rows_left_ = (end < n ? end : n) - row;
    start_dy(row);
    start_words(row);
    start_groups(row);
  }

  // A thread copies the same piece of several tokens.
  QK_DEVICE void start_dy(int row) {
    const int piece = threadIdx.x % kDyPieces, token = threadIdx.x / kDyPieces;
    dy_row_ = piece * 8;
    dy_ = p_.dy + ((token0_ + token) * p_.dy_stride + row + piece * 8) * 2;
    dy_to_ = shared_ + (token * kRowBytes + swizzled(piece, token) * 16);
    // Matrix i = lane / 8 of a product's 16 tokens and 16 rows is tokens 8 (i % 2) .. and piece
    // i / 2.
    const int own = lane_ / 8 % 2 * 8 + lane_ % 8;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const int from = swizzled(tile * 2 + lane_ / 16, own);
      fragments_[tile] = shared_ + (own * kRowBytes + from * 16);
    }
  }

  QK_DEVICE void start_words(int row) {
    const int offset = threadIdx.x % kTileCopies * 16, chunk0 = column0_ / kChunkColumns;
    const bool is_chunk = ptx::within(chunk0 + offset / kChunkBytes, p_.chunks);
    words_row_ = is_chunk ? static_cast<int>(threadIdx.x) / kTileCopies * kTileRows : kNothing;
    const int64_t tile = row / kTileRows + threadIdx.x / kTileCopies;
    words_ = static_cast<const unsigned char*>(p_.weight.words) +
             (tile * p_.chunks + chunk0) * kChunkBytes + offset;
    words_to_ = shared_ + (kDyBytes + static_cast<int>(threadIdx.x) * 16);
    // Of 4 bits, the first or the second half of a lane's words of a chunk; of 8 bits, a unit.
    const int own = kBits == 4 ? warp_ / 2 * kUnitBytes + warp_ % 2 * 8 : warp_ * kUnitBytes;
    words_from_ = shared_ + (kDyBytes + own + lane_ * 16);
  }

  // A thread copies 16 bytes of scales and of zero points at most: a stage has 256 of each at most,
  // 16 groups of 64 rows of 4 bytes.
  QK_DEVICE void start_groups(int row) {
    const int first = column0_ / p_.group_columns;
    const int last = (column0_ + kGradBlockColumns - 1) / p_.group_columns;
    const int count = (last < p_.groups ? last + 1 : p_.groups) - first;
    const int scales_at = kLeastBytes;
    const int zeros_at = scales_at + p_.slots * kGradStageRows * p_.scale_bytes;
    scales_ = start_copies(p_.weight.scales, p_.scale_bytes, first, count, row, scales_at);
    zeros_ = start_copies(p_.weight.zeros, p_.zero_bytes, first, count, row, zeros_at);
    const int own = lane_ / 4 * 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = column0_ + warp_ * kWarpColumns + step * kStepColumns;
      const int group = column / p_.group_columns;
      // Padding behind the last group has its numbers.
      const int slot = (group < p_.groups ? group : p_.groups - 1) - first;
      scales_from_[step] = shared_ + (scales_at + (slot * kGradStageRows + own) * p_.scale_bytes);
      zeros_from_[step] = shared_ + (zeros_at + (slot * kGradStageRows + own) * p_.zero_bytes);
    }
    same_group_ = column0_ / p_.group_columns == last || p_.group_columns % kWarpColumns == 0;
    group_.start();
  }

  // What a thread copies of the numbers of `count` groups, from group `first` and row `row` on.
  struct GroupCopies {
    const unsigned char* source;
    ptx::Shared target;
    int row;  // of the stage, where their tile begins: in it, rows are in an order of their own
  };

  QK_DEVICE GroupCopies start_copies(const void* numbers, int bytes, int first, int count, int row,
                                     int at) const {
    const int pieces = kGradStageRows * bytes / 16;
    const int slot = pieces == 0 ? count : static_cast<int>(threadIdx.x) / pieces;
    if (slot >= count) return {nullptr, shared_, kNothing};
    const int offset = (static_cast<int>(threadIdx.x) - slot * pieces) * 16;
    const int64_t from = (first + slot) * p_.rows + row;
    return {static_cast<const unsigned char*>(numbers) + from * bytes + offset,
            shared_ + (at + slot * kGradStageRows * bytes + offset),
            offset / bytes / kTileRows * kTileRows};
  }

  QK_DEVICE void copy_groups(GroupCopies& copies, int bytes, int write) {
    if (copies.row == kNothing) return;
    ptx::copy_async_16(copies.target + write, copies.source, ptx::within(copies.row, rows_left_));
    copies.source += kGradStageRows * bytes;
  }

  // Ends a group of copies.
  QK_DEVICE void copy_stage(int write) {
    constexpr int kAtOnce = kThreads / kDyPieces;
#pragma unroll
    for (int token = 0; token < kTokens; token += kAtOnce) {
      const int own = token + static_cast<int>(threadIdx.x) / kDyPieces;
      if (kTokens < kAtOnce && own >= kTokens) break;
      const bool is_token = ptx::within(token0_ + own, p_.m);
      ptx::copy_async_16(dy_to_ + (write + token * kRowBytes), dy_ + token * p_.dy_stride * 2,
                         is_token && ptx::within(dy_row_, rows_left_));
    }
    dy_ += kRowBytes;
    const int64_t tile_bytes = static_cast<int64_t>(p_.chunks) * kChunkBytes;
    constexpr int kTilesAtOnce = kThreads / kTileCopies;
#pragma unroll
    for (int i = 0; i < kWordCopies; ++i) {
      const int tile = i * kTilesAtOnce;
      ptx::copy_async_16(words_to_ + (write + tile * kTileBytes), words_ + tile * tile_bytes,
                         ptx::within(words_row_, rows_left_ - tile * kTileRows));
    }
    words_ += kRowTiles * tile_bytes;
    copy_groups(scales_, p_.scale_bytes, write);
    copy_groups(zeros_, p_.zero_bytes, write);
    rows_left_ -= kGradStageRows;
    ptx::copy_async_commit();
  }

  QK_DEVICE void multiply(int read) {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      uint32_t words[kSteps * Decoder<T>::kWords], w[kSteps][4];
      load_words(words_from_ + (read + tile * kTileBytes), words);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step == 0 || !same_group_) {
          const int row = tile * kTileRows;
          group_.template load<false>(p_.weight, scales_from_[step] + (read + row * p_.scale_bytes),
                                      zeros_from_[step] + (read + row * p_.zero_bytes));
        }
        uint32_t pairs[4];
        group_.weights(decoder_, words + step * Decoder<T>::kWords, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i) w[step][i] = ptx::movmatrix_trans(pairs[i]);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, fragments_[tile] + (read + t * 16 * kRowBytes));
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          // Rows g of the step's first or last eight columns, and rows g + 8.
          const uint32_t* b = w[eight / 2] + eight % 2 * 2;
          ptx::mma_m16n8k16<T>(sums_[t][eight], a, b[0], b[1]);
        }
      }
    }
  }

  static QK_DEVICE void load_words(ptx::Shared from, uint32_t (&words)[2]) {
    const uint2 held = ptx::load_shared<uint2>(from);
    words[0] = held.x;
    words[1] = held.y;
  }

  static QK_DEVICE void load_words(ptx::Shared from, uint32_t (&words)[4]) {
    const uint4 held = ptx::load_shared<uint4>(from);
    words[0] = held.x;
    words[1] = held.y;
    words[2] = held.z;
    words[3] = held.w;
  }

  // Leaves the sums of this part of N; where it is the last of the tile to, takes those of all.
  QK_DEVICE bool add_parts() {
    constexpr int kSums = kTokenTiles * kEights;  // of a thread, in fours
    constexpr int64_t kPart = int64_t{kSums} * kThreads * 4;
    float* const tile = p_.partials + static_cast<int64_t>(tile_) * p_.parts * kPart;
    const int own = static_cast<int>(threadIdx.x) * 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float* sum = sums_[i / kEights][i % kEights];
      const uint4 bits = {ptx::as_bits(sum[0]), ptx::as_bits(sum[1]), ptx::as_bits(sum[2]),
                          ptx::as_bits(sum[3])};
      ptx::store_global<uint4>(tile + part_ * kPart + i * kThreads * 4 + own, bits);
    }
    const ptx::Shared arrived = shared_ + kWarps * kDxBytes;
    ptx::sync_threads();  // this block's sums before its count
    if (threadIdx.x == 0) {
      ptx::store_shared<uint32_t>(arrived, ptx::count_block(p_.counters + tile_));
    }
    ptx::sync_threads();
    if (ptx::load_shared<uint32_t>(arrived) != static_cast<uint32_t>(p_.parts - 1)) return false;
    if (threadIdx.x == 0) ptx::store_global<uint32_t>(p_.counters + tile_, 0);
    for (int part = 0; part < p_.parts; ++part) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        float* sum = sums_[i / kEights][i % kEights];
        const uint4 bits =
            ptx::load_global_written<uint4>(tile + part * kPart + i * kThreads * 4 + own);
        const float four[4] = {ptx::as_float(bits.x), ptx::as_float(bits.y), ptx::as_float(bits.z),
                               ptx::as_float(bits.w)};
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = part == 0 ? four[j] : sum[j] + four[j];
      }
    }
    return true;
  }

  // Rounded sums go through shared memory, so that each token's are stored by 64 bytes.
  QK_DEVICE void write_dx() {
    const ptx::Shared own = shared_ + warp_ * kDxBytes;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = t * 16 + half * 8 + lane_ / 4;
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
          const float* sum = sums_[t][eight] + half * 2;
          ptx::store_shared<uint32_t>(own + (dx_at(token, eight) + lane_ % 4 * 4),
                                      ptx::pack2<T>(sum[0], sum[1]));
        }
      }
    }
    ptx::sync_warp();
    const int64_t k = p_.weight.k, column = column0_ + warp_ * kWarpColumns + lane_ % 4 * 8;
    for (int token = lane_ / 4; token < kTokens; token += 8) {
      if (!ptx::within(token0_ + token, p_.m)) break;
      const uint4 eight = ptx::load_shared<uint4>(own + dx_at(token, lane_ % 4));
      uint16_t* dx = p_.dx + (token0_ + token) * k + column;
      if (k % 8 == 0) {
        if (ptx::within(column, k)) ptx::store_global<uint4>(dx, eight);
      } else {
        const uint32_t four[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if (ptx::within(column + j, k)) {
            ptx::store_global<uint16_t>(dx + j, static_cast<uint16_t>(four[j / 2] >> (j % 2 * 16)));
          }
        }
      }
    }
  }

  const GradParameters& p_;
  ptx::Shared shared_;
  int lane_, warp_;
  int tile_, part_, column0_, stages_;
  int64_t token0_;

  // What is to be copied next, and where.
  int rows_left_;  // of the part, from the stage on
  int dy_row_, words_row_;
  const unsigned char *dy_, *words_;
  ptx::Shared dy_to_, words_to_;
  GroupCopies scales_, zeros_;

  // What is multiplied.
  ptx::Shared fragments_[kRowTiles], words_from_, scales_from_[kSteps], zeros_from_[kSteps];
  bool same_group_;
  Decoder<T> decoder_;
  WeightGroup<T, Decoder, kRealZeros> group_;
  float sums_[kTokenTiles][kEights][4] = {};
};

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
QK_KERNEL void QK_LAUNCH_BOUNDS((GradBlock<T, Decoder, kRealZeros, kTokens>::kThreads),
                                grad_resident_blocks(kTokens))
    weight_only_grad_kernel(const QK_GRID_CONSTANT GradParameters parameters) {
  GradBlock<T, Decoder, kRealZeros, kTokens>(parameters, ptx::shared_memory()).run();
}

template <class T, template <class> class Decoder, bool kRealZeros, int kTokens>
const char* launch_grad_tokens(GradParameters parameters, unsigned blocks, Stream stream) {
  using Block = GradBlock<T, Decoder, kRealZeros, kTokens>;
  parameters.stage_bytes = Block::stage_bytes(parameters);
  return launch(weight_only_grad_kernel<T, Decoder, kRealZeros, kTokens>, dim3{blocks, 1, 1},
                Block::kThreads, Block::kStages * parameters.stage_bytes, stream, parameters);
}

template <template <class> class Decoder, bool kRealZeros>
const char* launch_grad(GradParameters parameters, FloatType type, int tokens, unsigned blocks,
                        Stream stream) {
  if (type == FloatType::kHalf) {
    return tokens == 16
               ? launch_grad_tokens<Half, Decoder, kRealZeros, 16>(parameters, blocks, stream)
               : launch_grad_tokens<Half, Decoder, kRealZeros, 64>(parameters, blocks, stream);
  }
  return tokens == 16
             ? launch_grad_tokens<Bfloat16, Decoder, kRealZeros, 16>(parameters, blocks, stream)
             : launch_grad_tokens<Bfloat16, Decoder, kRealZeros, 64>(parameters, blocks, stream);
}

}  // namespace qkernels
