// w [N, K] of 16 bits from the fragment layout, for products that a dense GEMM does better.
//
// A warp turns a tile of 16 rows by 64 columns at a time: decoded as weight_only_mma does, turned
// in shared memory, and stored in rows of 128 bytes.

#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/groups.cuh"

namespace qkernels {

namespace {

constexpr int kWarps = 4;
constexpr int kTileBytes = kTileRows * kChunkColumns * 2;

struct DequantizeParameters {
  FragmentWeight weight;
  uint16_t* out;
  int64_t rows;  // padded n
  int chunks, groups, scale_bytes, zero_bytes;
  unsigned chunk_blocks;  // blocks side by side along K
};

template <class T, template <class> class Decoder, bool kRealZeros>
QK_KERNEL void dequantize_kernel(const QK_GRID_CONSTANT DequantizeParameters p) {
  constexpr int kBits = Decoder<T>::kBits;
  constexpr int kUnits = kLiesInSpans<kBits> ? 1 : kChunkColumns / kUnitColumns<kBits>;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const unsigned tile_number = blockIdx.x / p.chunk_blocks;
  const int chunk = static_cast<int>(blockIdx.x - tile_number * p.chunk_blocks) * kWarps + warp;
  if (!ptx::within(chunk, p.chunks)) return;
  const int64_t tile = tile_number;
  Decoder<T> decoder;
  decoder.start(p.weight.table);
  WeightGroup<T, Decoder, kRealZeros> group;
  group.start();
  const auto* words = static_cast<const unsigned char*>(p.weight.words) + lane * 16;
  if constexpr (kLiesInSpans<kBits>) {
    words += (tile / 2 * p.chunks + chunk) / 2 * (kBits * kUnitBytes);
  } else {
    words += (tile * p.chunks + chunk) * kUnits * kUnitBytes;
  }
  // 16 rows of eight pieces of 16 bytes, swizzled so that neither side conflicts.
  unsigned char* shared = ptx::shared_memory() + warp * kTileBytes;
  // A group is a step's columns or more, or the only one: a step enters one at most.
  const auto group_size = static_cast<unsigned>(p.weight.group_size);
  const auto first_column = static_cast<unsigned>(chunk) * kChunkColumns;
  const auto last_group = static_cast<unsigned>(p.groups - 1);
  unsigned number = first_column / group_size;
  if (number > last_group) number = last_group;  // a chunk that only fills a span up
  unsigned next_column = (number + 1) * group_size;
  const int64_t first = number * p.rows + tile * kTileRows + lane / 4 * 2;
  const auto* scales = static_cast<const unsigned char*>(p.weight.scales) + first * p.scale_bytes;
  const auto* zeros = static_cast<const unsigned char*>(p.weight.zeros) + first * p.zero_bytes;
  uint4 held = {0, 0, 0, 0};
  uint2 low = {0, 0};
  uint32_t third = 0;
  if constexpr (kLiesInSpans<kBits>) {
    low = ptx::load_global<uint2>(words + tile % 2 * kUnitBytes + chunk % 2 * 8);
    if (kBits == 3) {
      third = ptx::load_global<uint32_t>(words + 2 * kUnitBytes + tile % 2 * 8 + chunk % 2 * 4);
    }
  }
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (!kLiesInSpans<kBits> && step % (4 / kUnits) == 0) {
      held = ptx::load_global<uint4>(words + step * kUnits / 4 * kUnitBytes);
    }
    // Padding behind the last group has its numbers.
    const bool enters = first_column + step * kStepColumns >= next_column && number < last_group;
    if (enters) {
      ++number;
      next_column += group_size;
      scales += p.rows * p.scale_bytes;
      zeros += p.rows * p.zero_bytes;
    }
    if (step == 0 || enters) group.template load<true>(p.weight, scales, zeros);
    const uint32_t all[4] = {held.x, held.y, held.z, held.w};
    uint32_t pairs[4];
    if constexpr (kLiesInSpans<kBits>) {
      uint32_t of_step[2];
      span_words(step < 2 ? low.x : low.y, third, step, of_step);
      group.weights(decoder, of_step, pairs);
    } else {
      group.weights(decoder, all + (kUnits == 1 ? step : step % 2 * 2), pairs);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int row = lane / 4 + pair % 2 * 8, piece = step * 2 + pair / 2;
      ptx::store_shared<uint32_t>(shared + row * 128 + (piece ^ (row & 7)) * 16 + lane % 4 * 4,
                                  pairs[pair]);
    }
  }
  ptx::sync_warp();
  const int64_t n = p.weight.n, k = p.weight.k;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 4 + lane / 8, piece = lane % 8;
    const int64_t target = tile * kTileRows + row;
    const int64_t column = static_cast<int64_t>(chunk) * kChunkColumns + piece * 8;
    const uint4 eight = ptx::load_shared<uint4>(shared + row * 128 + (piece ^ (row & 7)) * 16);
    if (!ptx::within(target, n)) continue;
    uint16_t* out = p.out + target * k + column;
    if (k % 8 == 0) {
      if (ptx::within(column, k)) ptx::store_global<uint4>(out, eight);
    } else {
      const uint32_t four[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (ptx::within(column + j, k)) {
          ptx::store_global<uint16_t>(out + j, static_cast<uint16_t>(four[j / 2] >> (j % 2 * 16)));
        }
      }
    }
  }
}

template <template <class> class Decoder, bool kRealZeros>
const char* run(DecoderTag<Decoder, kRealZeros>, const DequantizeParameters& p, FloatType out_type,
                Stream stream) {
  // Along x, whose limit is far beyond that of y; see kMostNumbers.
  dim3 grid;
  grid.x = static_cast<unsigned>(ceil_div(p.weight.n, kTileRows) * p.chunk_blocks);
  constexpr int kThreads = kWarps * kLanes, kShared = kWarps * kTileBytes;
  return out_type == FloatType::kHalf ? launch(dequantize_kernel<Half, Decoder, kRealZeros>, grid,
                                               kThreads, kShared, stream, p)
                                      : launch(dequantize_kernel<Bfloat16, Decoder, kRealZeros>,
                                               grid, kThreads, kShared, stream, p);
}

}  // namespace

const char* dequantize(const FragmentWeight& weight, void* out, FloatType out_type, Stream stream) {
  if (weight.n == 0) return nullptr;
  DequantizeParameters p;
  p.weight = weight;
  p.out = static_cast<uint16_t*>(out);
  p.rows = padded_rows(weight.n);
  p.chunks = static_cast<int>(padded_columns(weight.k, code_bits(weight.code)) / kChunkColumns);
  p.groups = static_cast<int>(ceil_div(weight.k, weight.group_size));
  p.scale_bytes = size_of(weight.scale_type);
  p.zero_bytes = size_of(weight.zero_type);
  p.chunk_blocks = static_cast<unsigned>(ceil_div(p.chunks, kWarps));
  return visit_decoder(weight, [&](auto decoder) { return run(decoder, p, out_type, stream); });
}

}  // namespace qkernels
