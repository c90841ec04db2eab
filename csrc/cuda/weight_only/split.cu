// x of fp32 as three bf16 numbers each, whose sum it is.

#include "cuda/weight_only/weight_only.h"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

namespace {

constexpr int kThreads = 256, kPiece = 8;  // columns of a thread

struct SplitParameters {
  const float* x;
  unsigned char* out;
  int64_t stride, columns, pieces;  // pieces: of all rows
};

// The upper half of an fp32 number is a bf16 one, nearer to 0. What is left has 16 bits, and what
// is left of that 8. NaN and infinity leave nothing.
QK_DEVICE void split(float value, uint32_t (&parts)[3]) {
  constexpr uint32_t kUpper = 0xffff0000u, kExponent = 0x7f800000u;
#pragma unroll
  for (uint32_t& part : parts) {
    const uint32_t bits = ptx::as_bits(value);
    part = bits & kUpper;
    if ((bits & kExponent) == kExponent) {
      // A NaN whose bits are all in the lower half stays one.
      if ((bits & ~kUpper) != 0) part |= 0x00400000u;
      value = 0;
    } else {
      value -= ptx::as_float(part);
    }
  }
}

QK_KERNEL void split_kernel(const QK_GRID_CONSTANT SplitParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (!ptx::within(i, p.pieces)) return;
  const int64_t row_pieces = p.columns / kPiece, row = i / row_pieces;
  const int64_t column = (i - row * row_pieces) * kPiece;
  const auto* from = p.x + row * p.stride + column;
  const uint4 low = ptx::load_global<uint4>(from), high = ptx::load_global<uint4>(from + 4);
  const uint32_t eight[kPiece] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t words[3][kPiece / 2];
#pragma unroll
  for (int pair = 0; pair < kPiece / 2; ++pair) {
    uint32_t even[3], odd[3];
    split(ptx::as_float(eight[2 * pair]), even);
    split(ptx::as_float(eight[2 * pair + 1]), odd);
#pragma unroll
    for (int part = 0; part < 3; ++part) words[part][pair] = even[part] >> 16 | odd[part];
  }
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    const uint4 out = {words[part][0], words[part][1], words[part][2], words[part][3]};
    ptx::store_global<uint4>(p.out + ((row * 3 + part) * p.columns + column) * 2, out);
  }
}

}  // namespace

const char* split_floats(const float* x, int64_t stride, int64_t m, int64_t columns, void* out,
                         Stream stream) {
  if (m == 0) return nullptr;
  SplitParameters p;
  p.x = x;
  p.out = static_cast<unsigned char*>(out);
  p.stride = stride;
  p.columns = columns;
  p.pieces = m * (columns / kPiece);
  constexpr int64_t kMostBlocks = 0x7fffffff;
  const int64_t blocks = ceil_div(p.pieces, kThreads);
  if (blocks > kMostBlocks) return "x has more numbers than a launch can count";
  return launch(split_kernel, dim3{static_cast<unsigned>(blocks), 1, 1}, kThreads, 0, stream, p);
}

}  // namespace qkernels
