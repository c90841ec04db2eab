// Blocks flag columns of their part of the rows, a bit each; the last one to get there combines the
// parts and lists the columns in their order. So the host need not know how many there are.
//
//     block    256 columns of x, of every so many eighth row: a warp reads a row of them at a time

#include "cuda/activations/outliers.h"
#include "cuda/activations/pieces.cuh"
#include "integers.h"

namespace qkernels {

namespace {

constexpr int kThreads = 32 * kOutlierRows;
static_assert(kOutlierTileColumns == 32 * kPieceNumbers);

struct OutlierParameters {
  RowsIn x;
  int64_t m, k;
  int pieces, row_step;
  float threshold;
  unsigned char *flags, *partial;
  int32_t *columns, *count;
  uint32_t* counter;
};

// Shared memory: a word of each thread | whether this block is the last | words of warps.
constexpr int kArrived = kThreads * 4, kWarpSums = kArrived + 16;
constexpr int kSharedBytes = kWarpSums + kOutlierRows * 4;

// Bit i where number i of a piece is an outlier; NaN is no smaller than any threshold.
QK_DEVICE uint32_t flags_of(const Piece& piece, float threshold) {
  uint32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kPieceNumbers; ++i) {
    const bool inside = ptx::as_float(magnitude_bits(piece.values[i])) < threshold;
    flags |= inside ? 0u : 1u << i;
  }
  return flags;
}

QK_DEVICE int ones_of(uint32_t flags) {
  int ones = 0;
#pragma unroll
  for (int i = 0; i < kPieceNumbers; ++i) ones += static_cast<int>(flags >> i & 1);
  return ones;
}

// How many of all that the threads before this one counted; `all` is the sum of all threads.
// `warps` is shared memory of a word for each warp.
QK_DEVICE int before_this(int own, int& all, ptx::Shared warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int before = 0, sum = own;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const auto other = static_cast<int>(ptx::shuffle_xor(static_cast<uint32_t>(sum), mask));
    if ((lane & mask) != 0) before += other;
    sum += other;
  }
  if (lane == 0) ptx::store_shared<int32_t>(warps + warp * 4, sum);
  ptx::sync_threads();
  all = 0;
#pragma unroll
  for (int i = 0; i < kOutlierRows; ++i) {
    const int of_warp = ptx::load_shared<int32_t>(warps + i * 4);
    if (i < warp) before += of_warp;
    all += of_warp;
  }
  return before;
}

template <class T>
QK_KERNEL void QK_LAUNCH_BOUNDS(kThreads, 4)
    find_outliers_kernel(const QK_GRID_CONSTANT OutlierParameters p) {
  const ptx::Shared shared = ptx::shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int piece = static_cast<int>(blockIdx.x) * 32 + lane;
  uint32_t found = 0;
  if (piece < p.pieces) {
#pragma unroll 1
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kOutlierRows + thread / 32;
         ptx::within(row, p.m); row += p.row_step) {
      Piece numbers;
      numbers.load<T>(p.x.first + row * p.x.stride, p.x.aligned,
                      static_cast<int64_t>(piece) * kPieceNumbers, p.k);
      found |= flags_of(numbers, p.threshold);
    }
  }
  ptx::store_shared<uint32_t>(shared + thread * 4, found);
  ptx::sync_threads();
  if (thread < 32 && ptx::within(piece, p.pieces)) {
#pragma unroll
    for (int warp = 1; warp < kOutlierRows; ++warp) {
      found |= ptx::load_shared<uint32_t>(shared + (warp * 32 + lane) * 4);
    }
    // Behind k a piece is filled with zeros, which a threshold of 0 or less flags.
    const int64_t left = p.k - static_cast<int64_t>(piece) * kPieceNumbers;
    if (left < kPieceNumbers) found &= (1u << left) - 1;
    ptx::store_global<uint8_t>(p.partial + static_cast<int64_t>(blockIdx.y) * p.pieces + piece,
                               static_cast<uint8_t>(found));
  }
  ptx::sync_threads();
  if (thread == 0) ptx::store_shared<uint32_t>(shared + kArrived, ptx::count_block(p.counter));
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(shared + kArrived) != gridDim.x * gridDim.y - 1) return;
  if (thread == 0) ptx::store_global<uint32_t>(p.counter, 0);
  int listed = 0;
#pragma unroll 1
  for (int first = 0; first < p.pieces; first += kThreads) {
    const int own = first + thread;
    uint32_t flags = 0;
    if (ptx::within(own, p.pieces)) {
#pragma unroll 1
      for (unsigned part = 0; part < gridDim.y; ++part) {
        flags |= ptx::load_global_written<uint8_t>(p.partial +
                                                   static_cast<int64_t>(part) * p.pieces + own);
      }
      ptx::store_global<uint8_t>(p.flags + own, static_cast<uint8_t>(flags));
    }
    int all = 0;
    int at = listed + before_this(ones_of(flags), all, shared + kWarpSums);
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) {
      if ((flags >> i & 1) == 0) continue;
      ptx::store_global<int32_t>(p.columns + at, own * kPieceNumbers + i);
      ++at;
    }
    listed += all;
    // The next sums of warps must not come before all have read these.
    ptx::sync_threads();
  }
  if (thread == 0) ptx::store_global<int32_t>(p.count, listed);
}

template <class T>
const char* start(const OutlierParameters& p, int parts, Stream stream) {
  dim3 grid;
  grid.x = static_cast<unsigned>(ceil_div(p.pieces, 32));
  grid.y = static_cast<unsigned>(parts);
  return launch(find_outliers_kernel<T>, grid, kThreads, kSharedBytes, stream, p);
}

}  // namespace

const char* find_outliers(const OutlierArguments& arguments, Stream stream) {
  OutlierParameters p{};
  p.x = rows_in(arguments.x, arguments.x_stride, arguments.m, arguments.type);
  p.m = arguments.m;
  p.k = arguments.k;
  p.pieces = static_cast<int>(ceil_div(arguments.k, kPieceNumbers));
  p.row_step = arguments.parts * kOutlierRows;
  p.threshold = arguments.threshold;
  p.flags = arguments.flags;
  p.partial = arguments.partial;
  p.columns = arguments.columns;
  p.count = arguments.count;
  p.counter = arguments.counter;
  switch (arguments.type) {
    case FloatType::kHalf: return start<Half>(p, arguments.parts, stream);
    case FloatType::kBfloat16: return start<Bfloat16>(p, arguments.parts, stream);
    case FloatType::kFloat: return start<Single>(p, arguments.parts, stream);
  }
  return "no such type of rows";
}

}  // namespace qkernels
