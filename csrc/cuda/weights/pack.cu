// Codes, AWQ words and GPTQ words into the fragment layout, codes into that of integer products,
// and both back to codes.
//
// A thread writes one word of the layout, or one code: packing happens once, when a model is
// loaded.

#include "cuda/weights/fragment_int8.cuh"
#include "cuda/weights/pack.h"

namespace qkernels {

namespace {

// So that words of 32 rows fill whole blocks: by 64 columns or, of 2 and 3 bits, a span.
template <int kBits>
constexpr int kPackThreads = kBits == 3 ? 128 : 256;
static_assert(kRowMultiple * kChunkColumns * 4 / 32 % kPackThreads<4> == 0);
static_assert(kRowMultiple * kSpanColumns * 2 / 32 % kPackThreads<2> == 0);
static_assert(kRowMultiple * kSpanColumns * 3 / 32 % kPackThreads<3> == 0);

constexpr int kUnpackThreads = 256;

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
    // Without gaps: of 3 bits a code may begin in one word and end in the next.
    const int64_t bit = k * kBits, row = bit / 32;
    const int shift = static_cast<int>(bit % 32);
    const auto* words = reinterpret_cast<const uint32_t*>(p.source);
    uint32_t value = ptx::load_global<uint32_t>(words + row * p.n + n) >> shift;
    if (32 % kBits != 0 && shift + kBits > 32) {
      value |= ptx::load_global<uint32_t>(words + (row + 1) * p.n + n) << (32 - shift);
    }
    return value & kMask;
  }
}

// The same; 0 where there is none. `n` of all rows, k of the layout.
template <CodeSource kSource, int kBits>
QK_DEVICE uint32_t padded_code_at(const PackParameters& p, int64_t n, int64_t k) {
  const bool has_row = ptx::within(n, p.first_row + p.rows), has_column = ptx::within(k, p.k);
  if (!has_row || !has_column) return 0;
  const int64_t from = p.perm == nullptr ? k : ptx::load_global<int32_t>(p.perm + k);
  return code_at<kSource, kBits>(p, n, from);
}

// Of 2 and 3 bits: a thread's word, as place_in_span places codes.
template <CodeSource kSource, int kBits>
QK_DEVICE void pack_in_span(const PackParameters& p, int64_t i) {
  const int64_t spans = p.k_padded / kSpanColumns;
  const int64_t word = i + p.first_row / kRowMultiple * spans * (kBits * kLanes * 4);
  const int lane = static_cast<int>(word / 4 % kLanes), index = static_cast<int>(word % 4);
  const int64_t all = word / (4 * kLanes), span = all / kBits;
  const int unit = static_cast<int>(all % kBits);
  const int64_t row0 = span / spans * kRowMultiple + lane / 4;
  const int64_t column0 = span % spans * kSpanColumns + lane % 4 * 2;
  uint32_t value = 0;
  if (unit < 2) {
#pragma unroll
    for (int field = 0; field < 16; ++field) {
      const int step = index * 2 + field / 4 % 2, odd = field / 8;
      const int64_t n = row0 + unit * kTileRows + field % 2 * 8;
      const int64_t k = column0 + step * kStepColumns + field / 2 % 2 * 8 + odd;
      value |= (padded_code_at<kSource, kBits>(p, n, k) & 3) << (2 * field);
    }
  } else {
#pragma unroll
    for (int field = 0; field < 32; ++field) {
      const int step = index % 2 * 4 + field / 4 % 4, odd = field / 16;
      const int64_t n = row0 + index / 2 * kTileRows + field / 2 % 2 * 8;
      const int64_t k = column0 + step * kStepColumns + field % 2 * 8 + odd;
      value |= padded_code_at<kSource, kBits>(p, n, k) >> 2 << field;
    }
  }
  ptx::store_global<uint32_t>(p.words + word, value);
}

template <CodeSource kSource, int kBits>
QK_KERNEL void pack_kernel(const QK_GRID_CONSTANT PackParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads<kBits> + threadIdx.x;
  if constexpr (kLiesInSpans<kBits>) return pack_in_span<kSource, kBits>(p, i);
  constexpr int kColumns = kUnitColumns<kBits>;
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
    value |= padded_code_at<kSource, kBits>(p, n, k) << (field * kBits);
  }
  ptx::store_global<uint32_t>(p.words + word, value);
}

// A word of fragment_int8, from codes.
template <int kBits>
QK_KERNEL void pack_int8_kernel(const QK_GRID_CONSTANT PackParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads<kBits> + threadIdx.x;
  constexpr int kColumns = kUnitColumns<kBits>;
  // The inverse of fragment_int8_place.
  const int64_t word = i + p.first_row / kTileRows * (p.k_padded / kColumns) * kLanes * 4;
  const int lane = static_cast<int>(word / 4 % kLanes), index = static_cast<int>(word % 4);
  const int64_t unit = word / (4 * kLanes), units = p.k_padded / kColumns;
  const int64_t n = unit / units * kTileRows + lane / 4 + index % 2 * 8;
  const int64_t column0 = unit % units * kColumns + lane % 4 * 4 + index / 2 * 16;
  uint32_t value = 0;
  if (ptx::within(n, p.first_row + p.rows)) {
#pragma unroll
    for (int field = 0; field < 32 / kBits; ++field) {
      const int byte = field % 4, step = field / 4;
      const int64_t k = column0 + step * kInt8StepColumns + byte;
      const int64_t column = ptx::within(k, p.k) ? k : p.k - 1;
      value |= code_at<CodeSource::kCodes, kBits>(p, n, column) << (byte * 8 + step * 4);
    }
  }
  ptx::store_global<uint32_t>(p.words + word, kBits == 8 ? value ^ kInt8Sign : value);
}

struct UnpackParameters {
  const uint32_t* words;
  uint8_t* codes;
  int64_t k, k_padded, first_row, count;
};

template <int kBits>
QK_KERNEL void unpack_kernel(const QK_GRID_CONSTANT UnpackParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (!ptx::within(i, p.count)) return;
  const FragmentPlace place = fragment_place<kBits>(p.first_row + i / p.k, i % p.k, p.k_padded);
  constexpr uint32_t kMask = (1u << (kBits == 3 ? 2 : kBits)) - 1;
  uint32_t code = ptx::load_global<uint32_t>(p.words + place.word) >> place.bit & kMask;
  if constexpr (kBits == 3) {
    code |= (ptx::load_global<uint32_t>(p.words + place.third_word) >> place.third_bit & 1) << 2;
  }
  ptx::store_global<uint8_t>(p.codes + i, static_cast<uint8_t>(code));
}

template <int kBits>
QK_KERNEL void unpack_int8_kernel(const QK_GRID_CONSTANT UnpackParameters p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kUnpackThreads + threadIdx.x;
  if (!ptx::within(i, p.count)) return;
  const FragmentPlace place =
      fragment_int8_place<kBits>(p.first_row + i / p.k, i % p.k, p.k_padded);
  const uint32_t held = ptx::load_global<uint32_t>(p.words + place.word);
  const uint32_t codes = kBits == 8 ? held ^ kInt8Sign : held;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  ptx::store_global<uint8_t>(p.codes + i, static_cast<uint8_t>(codes >> place.bit & kMask));
}

dim3 blocks(int64_t count, int threads) {
  dim3 grid;
  grid.x = static_cast<unsigned>(ceil_div(count, threads));
  return grid;
}

template <int kBits>
const char* start(void (*kernel)(PackParameters), const PackParameters& p, Stream stream) {
  constexpr int kThreads = kPackThreads<kBits>;
  const int64_t words = padded_rows(p.rows) * p.k_padded * kBits / 32;
  return launch(kernel, blocks(words, kThreads), kThreads, 0, stream, p);
}

template <CodeSource kSource, int kBits>
const char* run(const PackParameters& p, Stream stream) {
  return start<kBits>(pack_kernel<kSource, kBits>, p, stream);
}

template <CodeSource kSource>
const char* run_bits(const PackParameters& p, int bits, Stream stream) {
  switch (bits) {
    case 2: return run<kSource, 2>(p, stream);
    case 3: return run<kSource, 3>(p, stream);
    case 4: return run<kSource, 4>(p, stream);
    default: return run<kSource, 8>(p, stream);
  }
}

PackParameters pack_parameters(const PackArguments& a) {
  PackParameters p;
  p.source = static_cast<const unsigned char*>(a.source);
  p.perm = a.perm;
  p.words = static_cast<uint32_t*>(a.words);
  p.n = a.n;
  p.k = a.k;
  p.k_padded = padded_columns(a.k, a.bits);
  p.first_row = a.first_row;
  p.rows = a.rows;
  return p;
}

UnpackParameters unpack_parameters(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                                   int64_t rows, int bits) {
  UnpackParameters p;
  p.words = static_cast<const uint32_t*>(words);
  p.codes = codes;
  p.k = k;
  p.k_padded = padded_columns(k, bits);
  p.first_row = first_row;
  p.count = rows * k;
  return p;
}

const char* start(void (*kernel)(UnpackParameters), const UnpackParameters& p, Stream stream) {
  return launch(kernel, blocks(p.count, kUnpackThreads), kUnpackThreads, 0, stream, p);
}

}  // namespace

const char* pack_fragment(const PackArguments& arguments, Stream stream) {
  const PackArguments& a = arguments;
  if (a.rows == 0) return nullptr;
  const PackParameters p = pack_parameters(a);
  if (a.kind == CodeSource::kAwq) return run<CodeSource::kAwq, 4>(p, stream);
  if (a.kind == CodeSource::kGptq) return run_bits<CodeSource::kGptq>(p, a.bits, stream);
  return run_bits<CodeSource::kCodes>(p, a.bits, stream);
}

const char* unpack_fragment(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                            int64_t rows, int bits, Stream stream) {
  if (rows == 0) return nullptr;
  const UnpackParameters p = unpack_parameters(words, codes, k, first_row, rows, bits);
  switch (bits) {
    case 2: return start(unpack_kernel<2>, p, stream);
    case 3: return start(unpack_kernel<3>, p, stream);
    case 4: return start(unpack_kernel<4>, p, stream);
    default: return start(unpack_kernel<8>, p, stream);
  }
}

const char* pack_fragment_int8(const PackArguments& arguments, Stream stream) {
  const PackArguments& a = arguments;
  if (a.rows == 0) return nullptr;
  const PackParameters p = pack_parameters(a);
  return a.bits == 4 ? start<4>(pack_int8_kernel<4>, p, stream)
                     : start<8>(pack_int8_kernel<8>, p, stream);
}

const char* unpack_fragment_int8(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                                 int64_t rows, int bits, Stream stream) {
  if (rows == 0) return nullptr;
  const UnpackParameters p = unpack_parameters(words, codes, k, first_row, rows, bits);
  return start(bits == 4 ? unpack_int8_kernel<4> : unpack_int8_kernel<8>, p, stream);
}

}  // namespace qkernels
