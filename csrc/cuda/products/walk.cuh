// What products with weights in a fragment layout share: y [M, N] = x [M, K] @ w [N, K].T as
// Y^T = W X^T on tensor cores, with W as the A operand, so that a single token costs eight columns
// and not sixteen rows, and the tokens fill the N side in tiles of 8.
//
//     tile       kTokens tokens x (32 * warps_n) rows of the weight
//     block      a share of the line of tiles (config.h): pieces of tiles, one after the other
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
//     then, over it:  sums [warps_k][kTokens][block rows + 4] of 4 bytes | whether this block is
//                     the last
//
// A group's scales are copied once, with the first stage that reaches into the group, to slot
// g % slots; there are as many slots as groups that the stages under way can touch.
//
// The sums of a block's warps along K, and then of the blocks along K, are added in a fixed order:
// the last block of a tile to arrive adds what all of them left in global memory. So the same call
// gives the same bits.

#pragma once

#include <type_traits>

#include "cuda/products/parameters.cuh"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTilesPerWarp = 2;
constexpr int kNone = 0x7fffffff;  // no column, no group, no slot
constexpr int kPadding = 4;  // numbers: lets the fragments of sums be stored without conflicts

// Four sums side by side.
template <class Number>
struct Four {
  Number values[4];

  static QK_DEVICE Number number(uint32_t bits) {
    if constexpr (std::is_same_v<Number, float>) {
      return ptx::as_float(bits);
    } else {
      return static_cast<Number>(bits);
    }
  }
  static QK_DEVICE uint32_t bits(Number value) {
    if constexpr (std::is_same_v<Number, float>) {
      return ptx::as_bits(value);
    } else {
      return static_cast<uint32_t>(value);
    }
  }

  static QK_DEVICE Four of(uint4 bits) {
    return {{number(bits.x), number(bits.y), number(bits.z), number(bits.w)}};
  }
  QK_DEVICE uint4 bits() const {
    return {bits(values[0]), bits(values[1]), bits(values[2]), bits(values[3])};
  }
  QK_DEVICE void add(const Four& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] += other.values[i];
  }
};

// Product, which derives from this, has:
//     kCopiesGroups        whether weights have scales or zero points that products meet
//     kHasExperts          whether there may be a plan
//     start()              once, when the kernels before have ended
//     start_groups()       before a piece
//     multiply_piece()     calls multiply_stages<kRun>() for what it takes of kRun
//     multiply_chunks<kRun>(rest, slot)
//                          adds what the warp has of a stage to its sums; its first column is
//                          `rest` columns into the group in `slot`
//     end_sums()           behind the last stage of a piece
//     take_total(tile, t, i)   a sum of the piece, which is then 0: element i of the fragment of
//                          row tile `tile` and token tile t
//     write(token, row, Four<Number>)   the sums of all of K, of four rows of the block
// kXBytes: of a number of x. Number: of sums, float or int32_t.
template <class Product, class Parameters, int kWeightBits, int kTileTokens, int kXNumberBytes,
          class Number>
class Walk {
 public:
  static constexpr int kTokens = kTileTokens;
  static constexpr int kBits = kWeightBits;
  static constexpr int kXBytes = kXNumberBytes;
  static constexpr WeightOnlyConfig kShape = {kTokens, 1, 2, 1};  // any blocks and stages
  static constexpr int kWarpsN = kShape.warps_n();
  static constexpr int kWarpsK = kShape.warps_k();
  static constexpr int kBlockRows = kShape.block_rows();
  static constexpr int kLog2BlockRows = kBlockRows == 64 ? 6 : kBlockRows == 128 ? 7 : 8;
  static_assert(1 << kLog2BlockRows == kBlockRows);
  static_assert(kWarpsN * kWarpsK == kWarps && kBlockRows == kWarpsN * kTilesPerWarp * kTileRows);
  static constexpr int kWarpChunks = kShape.warp_chunks(kBits, kXBytes);
  static constexpr int kWarpColumns = kWarpChunks * kChunkColumns;
  static constexpr int kStageChunks = kShape.stage_chunks(kBits, kXBytes);
  static constexpr int kStageColumns = kStageChunks * kChunkColumns;
  static constexpr int kChunkXBytes = kChunkColumns * kXBytes;
  static constexpr int kRowBytes = kStageColumns * kXBytes;  // of x in shared memory
  static_assert(kRowBytes % 128 == 0, "rows of x fill the banks");
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr bool kInSpans = kLiesInSpans<kBits>;
  static constexpr int kUnits = kInSpans ? 1 : kChunkColumns / kUnitColumns<kBits>;  // of a chunk
  static constexpr int kChunkBytes = kUnits * kUnitBytes;                            // of a tile
  static constexpr int kXStageBytes = kTokens * kRowBytes;
  static constexpr int kXPieces = kTokens * kPieces;                              // of a stage
  static constexpr int kXCopies = kXPieces < kThreads ? 1 : kXPieces / kThreads;  // of a thread
  static constexpr int kXTokens = kThreads / kPieces;  // between a thread's copies
  static_assert(kThreads % kPieces == 0, "a thread copies the same columns of several tokens");
  // Tokens that are multiples of 8 apart are swizzled alike.
  static constexpr int kXPlaces = kXTokens % 8 == 0 ? 1 : kXCopies;
  static constexpr int kTileBytes = kWarpChunks * kChunkBytes;
  static constexpr int kSpanBytes = kBits * kUnitBytes;
  static constexpr int kWarpBytes = kInSpans ? kSpanBytes : kTilesPerWarp * kTileBytes;
  static constexpr int kStageBytes = kXStageBytes + kWarps * kWarpBytes;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kSumRow = kBlockRows + kPadding;
  // Wider tiles may be several along M, which read the same weights.
  static constexpr bool kReadsOnce = kTokens < 64;
  static_assert(sizeof(Number) == 4);

  QK_DEVICE Walk(const Parameters& parameters, ptx::Shared shared)
      : p_(parameters), shared_(shared) {
    lane_ = threadIdx.x % kLanes;
    warp_ = threadIdx.x / kLanes;
    warp_n_ = warp_ % kWarpsN;
    warp_k_ = warp_ / kWarpsN;
    words_ = shared + (kXStageBytes + warp_ * kWarpBytes + lane_ * 16);
    words_ = words_.known_once();
    // Piece lane / 8 of token lane % 8 in the warp's first chunk; 4 pieces on, the swizzle makes
    // that bit 6 of the address.
    const int first_piece = warp_k_ * kWarpChunks * kChunkXBytes / 16;
    const int fragment = lane_ % 8 * kRowBytes + swizzled(first_piece + lane_ / 8, lane_ % 8) * 16;
    fragments_[0] = (shared + fragment).known_once();
    fragments_[1] = (shared + (fragment ^ 64)).known_once();
#pragma unroll
    for (int i = 0; i < kXPlaces; ++i) {
      const int piece = threadIdx.x % kPieces, token = threadIdx.x / kPieces + i * kXTokens;
      x_to_[i] = (shared + (token * kRowBytes + swizzled(piece, token) * 16)).known_once();
    }
    scales_at_ = ptx::known_once(p_.stages * kStageBytes);
    const int row = warp_n_ * kTilesPerWarp * kTileRows + lane_ / 4 * 2;
    const int zeros_at = scales_at_ + p_.slots * kBlockRows * p_.scale_bytes;
    scales_ = shared + (scales_at_ + row * p_.scale_bytes);
    zeros_ = shared + (zeros_at + row * p_.zero_bytes);
  }

  QK_DEVICE void run() {
    int block = blockIdx.x, span = 0;
    if (p_.span_blocks != static_cast<int>(gridDim.x)) {
      span = p_.by_span_blocks.quotient(block);
      block -= span * p_.span_blocks;
    }
    if (Product::kHasExperts && p_.plan != nullptr) {
      ptx::wait_for_kernels_before();  // which the plan is of
      if (p_.span_tiles == 1 && span >= ptx::load_global<int>(&p_.plan->tiles)) return;
    }
    const Shares shares = shares_of();
    const int begin = first_unit(shares, block);
    int left = shares.share + (block < shares.longer ? 1 : 0);
    if (left == 0) return;
    int tile = p_.by_units.quotient(begin), unit = begin - tile * p_.units;
    bool is_first = true;
    while (true) {
      const int end = min_of(p_.units, unit + left);
      start_piece(span * p_.span_tiles + tile, unit, end, is_first);
      if (is_first) {
        ptx::wait_for_kernels_before();
        product().start();
        is_first = false;
      }
      product().multiply_piece();
      finish(block, span, tile, end - unit);
      left -= end - unit;
      if (left == 0) return;
      ++tile;
      unit = 0;
      ptx::sync_threads();  // the next stages take the place of the sums
    }
  }

 protected:
  // From `rest` columns into the group in `slot` to so many columns on, at most a group.
  QK_DEVICE void pass(uint32_t columns, uint32_t& rest, uint32_t& slot) const {
    const uint32_t passed = rest + columns;
    rest = wrapped(passed, p_.group_columns);
    slot = wrapped(slot + (rest != passed ? 1 : 0), p_.slots);
  }

  // Columns of the piece, from the first one of the stage at work on.
  QK_DEVICE int columns_left_of_stage() const {
    return columns_left_ + p_.stages * kStageColumns;  // as many stages on are copied
  }

 private:
  QK_DEVICE Product& product() { return static_cast<Product&>(*this); }

  // `value`, below twice `size`, less `size` where it is not below that.
  static QK_DEVICE uint32_t wrapped(uint32_t value, uint32_t size) {
    const uint32_t less = value - size;
    return value < less ? value : less;
  }

  static QK_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

  // Where piece `piece` of a row of x lies in it.
  static QK_DEVICE int swizzled(int piece, int token) {
    return (piece & ~7) | ((piece ^ token) & 7);
  }

  QK_DEVICE Shares shares_of() const {
    if (!Product::kHasExperts || p_.plan == nullptr || p_.span_tiles == 1) return p_.shares;
    Shares shares;
    const uint4 first = ptx::load_global<uint4>(p_.plan);
    const uint2 second = ptx::load_global<uint2>(&p_.plan->shares.by_longer_share);
    shares.share = static_cast<int>(first.x);
    shares.longer = static_cast<int>(first.y);
    shares.by_share.factor = first.z;
    shares.by_share.shift = static_cast<int>(first.w);
    shares.by_longer_share.factor = second.x;
    shares.by_longer_share.shift = static_cast<int>(second.y);
    return shares;
  }

  // Of its span, where the share of a block begins; and the block in whose share a unit is.
  static QK_DEVICE int first_unit(const Shares& shares, int block) {
    return block * shares.share + min_of(block, shares.longer);
  }

  static QK_DEVICE int block_of(const Shares& shares, int unit) {
    const int of_longer = shares.longer * (shares.share + 1);
    return unit < of_longer ? shares.by_longer_share.quotient(unit)
                            : shares.longer + shares.by_share.quotient(unit - of_longer);
  }

  // Units [unit, end) of a tile.
  QK_DEVICE void start_piece(int tile, int unit, int end, bool is_first) {
    tile_ = tile;
    int row_tile, expert = 0;
    int64_t tokens;
    if (!Product::kHasExperts || p_.plan == nullptr) {
      // Tiles that read the same weights are neighbours.
      row_tile = p_.by_token_tiles.quotient(tile);
      token0_ = static_cast<int64_t>(tile - row_tile * p_.token_tiles) * kTokens;
      tokens = p_.m - token0_;
    } else {
      const int token_tile = p_.by_row_tiles.quotient(tile);
      row_tile = tile - token_tile * p_.row_tiles;
      const auto* planned = reinterpret_cast<const PlannedTokens*>(p_.plan + 1) + token_tile;
      const uint4 here = ptx::load_global<uint4>(planned);
      expert = static_cast<int>(here.x);
      token0_ = here.y;
      tokens = static_cast<int>(here.z - here.y);
    }
    tokens_ = tokens < kTokens ? static_cast<int>(tokens) : kTokens;
    block_row_ = static_cast<int64_t>(row_tile) * kBlockRows;
    rows_before_ = expert * p_.rows;
    const int first_chunk = unit * p_.unit_chunks;
    last_chunk_ = min_of(end * p_.unit_chunks, p_.chunks);
    stages_ = (last_chunk_ - first_chunk + kStageChunks - 1) / kStageChunks;
    columns_left_ = min_of(last_chunk_ * kChunkColumns, static_cast<int>(p_.weight.k)) -
                    first_chunk * kChunkColumns;
    piece_column_ = first_chunk * kChunkColumns;
    start_weights(first_chunk);
    if (is_first) prefetch_weights(first_chunk);
    start_activations(first_chunk * kChunkColumns);
    start_groups(first_chunk * kChunkColumns);
  }

  QK_DEVICE void start_weights(int first_chunk) {
    const int64_t warp_row = block_row_ + warp_n_ * kTilesPerWarp * kTileRows;
    const int chunk = first_chunk + warp_k_ * kWarpChunks;
    // A warp beyond the last row has nothing to copy.
#pragma unroll
    for (int c = 0; c < kWarpChunks; ++c) {
      const int column = (warp_k_ * kWarpChunks + c) * kChunkColumns;
      own_columns_[c] = warp_row < p_.rows ? column : kNone;
    }
    weights_ = static_cast<const unsigned char*>(p_.weight.words) + lane_ * 16;
    const int64_t row = rows_before_ + warp_row;
    if constexpr (kInSpans) {
      weights_ += (row / kRowMultiple * p_.chunks + chunk) / 2 * kSpanBytes;
    } else {
      weights_ += (row / kTileRows * p_.chunks + chunk) * kChunkBytes;
    }
  }

  // Of the first stages, by a lane for each row of tiles, or of spans, of the warps that are the
  // first along K.
  QK_DEVICE void prefetch_weights(int first_chunk) {
    const int chunks = min_of((p_.stages - 1) * kStageChunks, last_chunk_ - first_chunk);
    if (warp_k_ != 0 || lane_ >= (kInSpans ? 1 : kTilesPerWarp) || own_columns_[0] == kNone) return;
    const int64_t row_bytes = static_cast<int64_t>(p_.chunks) * kChunkBytes;
    ptx::prefetch(weights_ + lane_ * (row_bytes - 16),
                  kInSpans ? chunks / 2 * kSpanBytes : chunks * kChunkBytes);
  }

  // A thread copies the same 16 bytes of a stage's columns for every kXTokens-th token.
  QK_DEVICE void start_activations(int column) {
    const int piece = threadIdx.x % kPieces, token = threadIdx.x / kPieces;
    x_ = p_.x + ((token0_ + token) * p_.x_stride + column + piece * (16 / kXBytes)) * kXBytes;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      const bool is_token = ptx::within(token + i * kXTokens, tokens_);
      x_column_[i] = ptx::known_once(is_token ? piece * (16 / kXBytes) : kNone);
    }
  }

  QK_DEVICE void start_groups(int column) {
    const int size = p_.group_columns, first = p_.by_group_columns.quotient(column);
    const int own = column + warp_k_ * kWarpChunks * kChunkColumns;
    const int own_group = p_.by_group_columns.quotient(own);
    rest_ = own - own_group * size;
    slot_ = own_group - first;
    loaded_slot_ = kNone;
    next_group_ = first;
    next_slot_ = 0;
    gap_ = first * size - column;
    const int last_group = p_.by_group_columns.quotient(last_chunk_ * kChunkColumns - 1);
    end_group_ = min_of(p_.groups, last_group + 1);
    product().start_groups();
    if constexpr (!Product::kCopiesGroups) return;
    // Half of the threads copy scales, half zero points; a thread copies the same 16 bytes of every
    // groups_at_once_-th group.
    constexpr int kHalf = kThreads / 2;
    const bool is_scale = threadIdx.x < kHalf;
    const int bytes = is_scale ? p_.scale_bytes : p_.zero_bytes;
    my_group_ = kNone;
    if (bytes == 0) return;
    // Of 16 bytes each: a power of two, for the rows of a block and 1, 2 or 4 bytes are.
    const int log2_pieces = kLog2BlockRows - 4 + bytes / 2;
    const int index = threadIdx.x % kHalf, offset = (index & ((1 << log2_pieces) - 1)) * 16;
    groups_at_once_ = kHalf >> log2_pieces;
    const int64_t from = block_row_ * bytes + offset;
    if (ptx::within(from, p_.rows * bytes)) my_group_ = index >> log2_pieces;
    group_source_ =
        static_cast<const unsigned char*>(is_scale ? p_.weight.scales : p_.weight.zeros);
    group_source_ += rows_before_ * p_.groups * bytes + from;
    group_bytes_ = p_.rows * bytes;
    slot_bytes_ = kBlockRows * bytes;
    const int zeros_at = scales_at_ + p_.slots * kBlockRows * p_.scale_bytes;
    group_target_ = shared_ + ((is_scale ? scales_at_ : zeros_at) + offset);
  }

  // Where a piece begins in the middle of a group: that one. Then `gap_` columns lie between the
  // next stage and the first group that was not copied, and a stage begins stage_groups_ or one
  // more.
  QK_DEVICE void copy_first_group() {
    if (!Product::kCopiesGroups || gap_ == 0) return;
    gap_ += p_.group_columns;
    copy_groups(1);
  }

 protected:
  // All of the piece. kRun: the columns that lie in one group at least.
  template <int kRun>
  QK_DEVICE void multiply_stages() {
    copy_first_group();
    write_ = 0;
    for (int stage = 0; stage < p_.stages - 1; ++stage, write_ += kStageBytes) copy_stage();
    read_ = 0;
#pragma unroll 1
    for (int stage = 0; stage < stages_; ++stage) {
      wait_for_stage();
      // Every warp's copies of this stage have landed, and every warp is done with the stage
      // before, whose place the next copies take. Behind the piece they bring zeros, and so nothing
      // has to be left out: neither they, nor the product of what they brought.
      ptx::sync_threads();
      copy_stage();
      multiply<kRun>();
      write_ = read_;
      read_ = read_ + kStageBytes == scales_at_ ? 0 : read_ + kStageBytes;
    }
    product().end_sums();
    ptx::copy_async_wait<0>();
    ptx::sync_threads();  // the sums take the place of the stages
  }

 private:
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

  // Ends a group of copies.
  QK_DEVICE void copy_stage() {
    copy_weights();
    copy_activations();
    if constexpr (Product::kCopiesGroups) {
      const int count = p_.stage_groups + (p_.stage_rest > gap_ ? 1 : 0);
      gap_ += count * p_.group_columns - kStageColumns;
      copy_groups(count);
    }
    columns_left_ -= kStageColumns;
    ptx::copy_async_commit();
  }

  QK_DEVICE void copy_weights() {
    if constexpr (kInSpans) {
#pragma unroll
      for (int u = 0; u < kBits; ++u) copy_unit(u * kUnitBytes, u * kUnitBytes, own_columns_[0]);
      weights_ += kStageChunks / 2 * kSpanBytes;
    } else {
      const int64_t row_bytes = static_cast<int64_t>(p_.chunks) * kChunkBytes;  // of a row of tiles
#pragma unroll
      for (int c = 0; c < kWarpChunks; ++c) {
#pragma unroll
        for (int tile = 0; tile < kTilesPerWarp; ++tile) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u) {
            const int offset = c * kChunkBytes + u * kUnitBytes;
            copy_unit(tile * kTileBytes + offset, tile * row_bytes + offset, own_columns_[c]);
          }
        }
      }
      weights_ += kStageChunks * kChunkBytes;
    }
  }

  // `column` of the stage is the unit's first.
  QK_DEVICE void copy_unit(int to, int64_t from, int column) {
    const bool is_there = ptx::within(column, columns_left_);
    if constexpr (kReadsOnce) {
      ptx::copy_async_16_once(words_ + write_ + to, weights_ + from, is_there);
    } else {
      ptx::copy_async_16(words_ + write_ + to, weights_ + from, is_there);
    }
  }

  QK_DEVICE void copy_activations() {
    // A narrow stage of few tokens has fewer pieces than there are threads.
    if (kXPieces < kThreads && static_cast<int>(threadIdx.x) >= kXPieces) return;
    const int64_t token_bytes = p_.x_stride * (kXBytes * kXTokens);
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      ptx::copy_async_16(x_to_[i % kXPlaces] + write_ + i / kXPlaces * kXTokens * kRowBytes,
                         x_ + i * token_bytes, ptx::within(x_column_[i], columns_left_));
    }
    x_ += kRowBytes;
  }

  // The next `count` groups; behind the last one, where K is padded, scales of zero.
  QK_DEVICE void copy_groups(int count) {
    for (int i = my_group_; i < count; i += groups_at_once_) {
      const int slot = static_cast<int>(wrapped(next_slot_ + i, p_.slots));
      ptx::copy_async_16(group_target_ + slot * slot_bytes_,
                         group_source_ + (next_group_ + i) * group_bytes_,
                         ptx::within(next_group_ + i, end_group_));
    }
    next_group_ += count;
    next_slot_ = wrapped(next_slot_ + count, p_.slots);
  }

  template <int kRun>
  QK_DEVICE void multiply() {
    product().template multiply_chunks<kRun>(rest_, slot_);
    const uint32_t passed = rest_ + p_.stage_rest;
    rest_ = wrapped(passed, p_.group_columns);
    slot_ = wrapped(slot_ + p_.stage_groups + (rest_ != passed ? 1 : 0), p_.slots);
  }

  // sums [warps_k][kTokens][kSumRow] in shared memory
  QK_DEVICE ptx::Shared sum_at(int part, int token, int row) const {
    return shared_ + ((part * kTokens + token) * kSumRow + row) * 4;
  }

  // Writes y, or where other blocks have pieces of the tile, leaves sums for the last one to add.
  QK_DEVICE void finish(int block, int span, int tile, int units) {
#pragma unroll
    for (int i = 0; i < kTilesPerWarp; ++i) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = (warp_n_ * kTilesPerWarp + i) * kTileRows + j / 2 * 8 + lane_ / 4;
          const int token = t * 8 + lane_ % 4 * 2 + j % 2;
          ptx::store_shared<Number>(sum_at(warp_k_, token, row), product().take_total(i, t, j));
        }
      }
    }
    ptx::sync_threads();
    const bool is_whole = units == p_.units;
    const Shares shares = shares_of();
    Number* const partial = partial_of(shares, block, span, tile);
    for (int i = threadIdx.x; i < kTokens * kBlockRows / 4; i += kThreads) {
      const int token = i / (kBlockRows / 4), row = i % (kBlockRows / 4) * 4;
      if (!ptx::within(token, tokens_)) continue;
      Four<Number> sum = load_four(sum_at(0, token, row));
#pragma unroll
      for (int part = 1; part < kWarpsK; ++part) sum.add(load_four(sum_at(part, token, row)));
      if (is_whole) {
        product().write(token, row, sum);
      } else {
        ptx::store_global<uint4>(partial + token * kBlockRows + row, sum.bits());
      }
    }
    if (!is_whole) add_partials(shares, span, tile);
  }

  // Where a block leaves its sums of a tile of its span: those of the tile that its share begins in
  // the middle or at the beginning of, and behind them those of another.
  QK_DEVICE Number* partial_of(const Shares& shares, int block, int span, int tile) const {
    const int64_t index = 2 * (static_cast<int64_t>(span) * p_.span_blocks + block) +
                          (first_unit(shares, block) < tile * p_.units ? 1 : 0);
    return static_cast<Number*>(p_.partials) + index * kTokens * kBlockRows;
  }

  // The last block of the tile to get here adds the sums of all.
  QK_DEVICE void add_partials(const Shares& shares, int span, int tile) {
    const int first = block_of(shares, tile * p_.units);
    const int last = block_of(shares, (tile + 1) * p_.units - 1);
    const ptx::Shared arrived = sum_at(kWarpsK, 0, 0);  // behind the sums
    ptx::sync_threads();                                // this block's sums before its count
    if (threadIdx.x == 0) {
      ptx::store_shared<uint32_t>(arrived, ptx::count_block(p_.counters + tile_));
    }
    ptx::sync_threads();
    if (ptx::load_shared<uint32_t>(arrived) != static_cast<uint32_t>(last - first)) return;
    if (threadIdx.x == 0) ptx::store_global<uint32_t>(p_.counters + tile_, 0);
    for (int i = threadIdx.x; i < kTokens * kBlockRows / 4; i += kThreads) {
      const int token = i / (kBlockRows / 4), row = i % (kBlockRows / 4) * 4;
      if (!ptx::within(token, tokens_)) continue;
      Four<Number> sum = {{0, 0, 0, 0}};
      for (int block = first; block <= last; ++block) {
        const Number* source = partial_of(shares, block, span, tile) + token * kBlockRows + row;
        sum.add(Four<Number>::of(ptx::load_global_written<uint4>(source)));
      }
      product().write(token, row, sum);
    }
  }

  static QK_DEVICE Four<Number> load_four(ptx::Shared sums) {
    return Four<Number>::of(ptx::load_shared<uint4>(sums));
  }

 protected:
  // In an order that nvcc makes the fewest moves of.
  const Parameters& p_;
  ptx::Shared shared_;
  int lane_, warp_, warp_n_, warp_k_;

  // The piece at work.
  int tile_;
  int64_t block_row_, token0_;
  int64_t rows_before_;  // of the experts before this one
  int tokens_;           // at most kTokens
  int last_chunk_, stages_, piece_column_;

  // What is to be copied next, and where; offsets of shared memory are in bytes.
  int write_;
  int columns_left_;  // of the piece, from the stage on
  const unsigned char* weights_;
  int own_columns_[kWarpChunks];  // of the stage, where the warp's chunks begin
  ptx::Shared words_;
  const unsigned char* x_;
  ptx::Shared x_to_[kXPlaces];
  int x_column_[kXCopies];  // of the stage
  int next_group_, end_group_, gap_;
  uint32_t next_slot_;
  int my_group_, groups_at_once_, slot_bytes_;
  ptx::Shared group_target_;
  const unsigned char* group_source_;
  int64_t group_bytes_;

  // What is to be multiplied next. The warp's first chunk of the stage is `rest_` columns into the
  // group in `slot_`.
  int read_;
  int scales_at_;
  ptx::Shared fragments_[2], scales_, zeros_;
  uint32_t rest_, slot_, loaded_slot_;
};

}  // namespace qkernels
