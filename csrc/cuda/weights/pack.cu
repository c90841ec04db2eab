// Codes, AWQ words and GPTQ words into the fragment layout, and back to codes.
//
// A thread writes one word of the layout, or one code: packing happens once, when a model is
// loaded.

#include "cuda/weights/fragment.cuh"
#include "cuda/weights/pack.h"

namespace qkernels {

namespace {

constexpr int kThreads = 256;

struct PackParameters {
  const unsigned char* source;
  const int32_t* perm;
  uint32_t* words;
  int64_t n, k, k_padded, first_row, rows;
};

// Code of row n (counted from first_row for kCodes) and column k of the source.
template <CodeSource kSource, int kBits>
QK_DEVICE uint32_t code_at(const PackParameters& p, int64_t n, int64_t k) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  if constexpr (kSource == CodeSource::kCodes) {
    return ptx::load_global<uint8_t>(p.source + (n - p.first_row) * p.k + k) & kMask;
  } else if constexpr (kSource == CodeSource::kAwq) {
    // Column 8c + j of N is nibble [0, 4, 1, 5, 2, 6, 3, 7][j] of word c.
    const int j = static_cast<int>(n % 8), nibble = j / 2 + j % 2 * 4;
    const auto* words = reinterpret_cast<const uint32_t*>(p.source);
    return ptx::load_global<uint32_t>(words + k * (p.n / 8) + n / 8) >> (4 * nibble) & kMask;
  } else {
    constexpr int kValues = 32 / kBits;
    const auto* words = reinterpret_cast<const uint32_t*>(p.source);
    const int shift = static_cast<int>(k % kValues) * kBits;
    return ptx::load_global<uint32_t>(words + k / kValues * p.n + n) >> shift & kMask;
  }
}

template <CodeSource kSource, int kBits>
QK_KERNEL void pack_kernel(const QK_GRID_CONSTANT PackParameters p) {
  constexpr int kColumns = kUnitColumns<kBits>;
  // Whole blocks: 32 rows by 64 columns are a multiple of kThreads words.
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  // The inverse of fragment_place.
  const int64_t word = i + p.first_row / kTileRows * (p.k_padded / kColumns) * kLanes * 4;
  const int lane = static_cast<int>(word / 4 % kLanes);
  const int64_t unit = word / (4 * kLanes), units = p.k_padded / kColumns;
  const int64_t row0 = unit / units * kTileRows + lane / 4;
  const int64_t column0 = unit % units * kColumns + lane % 4 * 2;
  const int index = static_cast<int>(word % 4);
  uint32_t value = 0;
#pragma unroll
  for (int field = 0; field < 32 / kBits; ++field) {
    const int pair = kBits == 4 ? field % 4 : index % 2 * 2 + field % 2;
    const int odd = kBits == 4 ? field / 4 : field / 2;
    const int step = kBits == 4 ? index : index / 2;
    const int64_t n = row0 + pair % 2 * 8;
    const int64_t k = column0 + step * kStepColumns + pair / 2 * 8 + odd;
    const bool has_row = ptx::within(n, p.first_row + p.rows);
    const bool has_column = ptx::within(k, p.k);
    if (has_row && has_column) {
      const int64_t from = p.perm == nullptr ? k : ptx::load_global<int32_t>(p.perm + k);
      value |= code_at<kSource, kBits>(p, n, from) << (field * kBits);
    }
  }
  ptx::store_global<uint32_t>(p.words + word, value);
}

struct UnpackParameters {
  const uint32_t* words;
  uint8_t* codes;
  int64_t k, k_padded, first_row, count;
};

template <int kBits>
QK_KERNEL void unpack_kernel(const QK_GRID_CONSTANT UnpackParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (!ptx::within(i, p.count)) return;
  const FragmentPlace place = fragment_place<kBits>(p.first_row + i / p.k, i % p.k, p.k_padded);
  const uint32_t word = ptx::load_global<uint32_t>(p.words + place.word);
  ptx::store_global<uint8_t>(p.codes + i,
                             static_cast<uint8_t>(word >> place.bit & ((1u << kBits) - 1)));
}

dim3 blocks(int64_t count) {
  dim3 grid;
  grid.x = static_cast<unsigned>(ceil_div(count, kThreads));
  return grid;
}

}  // namespace

const char* pack_fragment(const PackArguments& arguments, Stream stream) {
  const PackArguments& a = arguments;
  if (a.rows == 0) return nullptr;
  PackParameters p;
  p.source = static_cast<const unsigned char*>(a.source);
  p.perm = a.perm;
  p.words = static_cast<uint32_t*>(a.words);
  p.n = a.n;
  p.k = a.k;
  p.k_padded = padded_columns(a.k);
  p.first_row = a.first_row;
  p.rows = a.rows;
  const int64_t words = padded_rows(a.rows) * p.k_padded * a.bits / 32;
  static_assert(kRowMultiple * kChunkColumns * 4 / 32 % kThreads == 0);
  const auto start = [&](void (*kernel)(PackParameters)) {
    return launch(kernel, blocks(words), kThreads, 0, stream, p);
  };
  if (a.kind == CodeSource::kAwq) return start(pack_kernel<CodeSource::kAwq, 4>);
  if (a.kind == CodeSource::kGptq) {
    return a.bits == 4 ? start(pack_kernel<CodeSource::kGptq, 4>)
                       : start(pack_kernel<CodeSource::kGptq, 8>);
  }
  return a.bits == 4 ? start(pack_kernel<CodeSource::kCodes, 4>)
                     : start(pack_kernel<CodeSource::kCodes, 8>);
}

const char* unpack_fragment(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                            int64_t rows, int bits, Stream stream) {
  if (rows == 0) return nullptr;
  UnpackParameters p;
  p.words = static_cast<const uint32_t*>(words);
  p.codes = codes;
  p.k = k;
  p.k_padded = padded_columns(k);
  p.first_row = first_row;
  p.count = rows * k;
  return bits == 4 ? launch(unpack_kernel<4>, blocks(p.count), kThreads, 0, stream, p)
                   : launch(unpack_kernel<8>, blocks(p.count), kThreads, 0, stream, p);
}

}  // namespace qkernels
