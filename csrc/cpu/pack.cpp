#include "cpu/pack.h"

#include <algorithm>
#include <cassert>
#include <cstring>

namespace qkernels::cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "words are read and written as bytes, lowest first");

// Starting threads costs about as much as packing this many codes.
constexpr int64_t kCodesWorthThreads = 1 << 16;
// Rows of one planar block: 256 bytes of each row of words, and 16 KB of words at plane 64.
constexpr int64_t kBlockN = 64;
constexpr int64_t kMaxPlane = 64;

int threads_for(int64_t codes, int threads) { return codes < kCodesWorthThreads ? 1 : threads; }

// `width` low bits of every `lane` bits.
constexpr uint64_t lane_mask(int lane, int width) {
  uint64_t mask = 0;
  for (int at = 0; at < 64; at += lane) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// 8 bytes of one code each -> 8 * kBits adjacent bits, by halving the number of lanes three times.
template <int kBits>
uint64_t gather8(uint64_t x) {
  x = (x | x >> (8 - kBits)) & lane_mask(16, 2 * kBits);
  x = (x | x >> (16 - 2 * kBits)) & lane_mask(32, 4 * kBits);
  return x | x >> (32 - 4 * kBits);
}

// The inverse of gather8; the bits of x above 8 * kBits must be 0.
template <int kBits>
uint64_t scatter8(uint64_t x) {
  x = (x | x << (32 - 4 * kBits)) & lane_mask(32, 4 * kBits);
  x = (x | x << (16 - 2 * kBits)) & lane_mask(16, 2 * kBits);
  return (x | x << (8 - kBits)) & lane_mask(8, kBits);
}

// 8 codes take kBits whole bytes of the stream, so a row is packed by groups of 8 without regard
// to words; the last group may be short.
template <int kBits>
uint8_t pack_row(const uint8_t* codes, uint8_t* stream, int64_t k, int64_t stream_bytes) {
  const int64_t groups = k / 8;
  uint64_t seen = 0;
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t x;
    std::memcpy(&x, codes + 8 * g, 8);
    seen |= x;
    if constexpr (kBits < 8) x = gather8<kBits>(x);
    std::memcpy(stream + kBits * g, &x, kBits);
  }
  const int64_t written = kBits * groups;
  std::memset(stream + written, 0, stream_bytes - written);
  if (k % 8 != 0) {
    uint64_t x = 0;
    std::memcpy(&x, codes + 8 * groups, k % 8);
    seen |= x;
    if constexpr (kBits < 8) x = gather8<kBits>(x);
    std::memcpy(stream + written, &x, std::min<int64_t>(kBits, stream_bytes - written));
  }
  for (int half : {32, 16, 8}) seen |= seen >> half;
  return static_cast<uint8_t>(seen);
}

template <int kBits>
void unpack_row(const uint8_t* stream, uint8_t* codes, int64_t k, int64_t stream_bytes) {
  const int64_t groups = k / 8;
  for (int64_t g = 0; g < groups; ++g) {
    uint64_t x = 0;
    std::memcpy(&x, stream + kBits * g, kBits);
    if constexpr (kBits < 8) x = scatter8<kBits>(x);
    std::memcpy(codes + 8 * g, &x, 8);
  }
  if (k % 8 != 0) {
    const int64_t read = kBits * groups;
    uint64_t x = 0;
    std::memcpy(&x, stream + read, std::min<int64_t>(kBits, stream_bytes - read));
    if constexpr (kBits < 8) x = scatter8<kBits>(x);
    std::memcpy(codes + 8 * groups, &x, k % 8);
  }
}

template <int kBits>
uint8_t pack_dense_impl(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t k,
                        int threads) {
  const int64_t stride = dense_words(k, kBits);
  unsigned seen = 0;
#pragma omp parallel for num_threads(threads) reduction(| : seen)
  for (int64_t row = 0; row < rows; ++row) {
    seen |= pack_row<kBits>(codes + row * k, reinterpret_cast<uint8_t*>(words + row * stride), k,
                            4 * stride);
  }
  return static_cast<uint8_t>(seen);
}

template <int kBits>
void unpack_dense_impl(const uint32_t* words, uint8_t* codes, int64_t rows, int64_t k,
                       int threads) {
  const int64_t stride = dense_words(k, kBits);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    unpack_row<kBits>(reinterpret_cast<const uint8_t*>(words + row * stride), codes + row * k, k,
                      4 * stride);
  }
}

// The part of the planar words that one thread handles at a time: tile `tile` of K, rows
// [n_first, n_first + n_count) of the weight.
struct PlanarBlock {
  int64_t n, k, plane, tile, n_first, n_count;

  PlanarBlock(int64_t n, int64_t k, int64_t plane, int64_t index)
      : n(n),
        k(k),
        plane(plane),
        tile(index / ceil_div(n, kBlockN)),
        n_first(index % ceil_div(n, kBlockN) * kBlockN),
        n_count(std::min(kBlockN, n - n_first)) {}

  static int64_t count(int64_t n, int64_t k, int bits, int64_t plane) {
    return ceil_div(n, kBlockN) * (planar_rows(k, bits, plane) / plane);
  }

  // Where the `plane` codes of field i of row n_first + j begin, and how many of them exist.
  int64_t column(int64_t fields, int64_t i) const { return (tile * fields + i) * plane; }
  int64_t offset(int64_t j, int64_t column) const { return (n_first + j) * k + column; }
  int64_t columns_at(int64_t column) const { return std::clamp<int64_t>(k - column, 0, plane); }
  // Where the words of row r of the tile begin.
  int64_t word_offset(int64_t r) const { return (tile * plane + r) * n + n_first; }
};

// Both directions go through a block of words that lies along K, where the fields of all words of
// a row are shifted at once, and transpose it on the way to or from memory.
template <int kBits>
uint8_t pack_planar_block(const uint8_t* codes, uint32_t* words, const PlanarBlock& block) {
  constexpr int64_t kFields = codes_per_word(kBits);
  uint32_t lines[kBlockN][kMaxPlane];
  uint8_t seen = 0;
  for (int64_t j = 0; j < block.n_count; ++j) {
    uint32_t* line = lines[j];
    std::fill_n(line, block.plane, 0);
    for (int64_t i = 0; i < kFields; ++i) {
      const int64_t column = block.column(kFields, i);
      const int64_t count = block.columns_at(column);
      if (count == 0) break;
      const uint8_t* code = codes + block.offset(j, column);
      for (int64_t r = 0; r < count; ++r) {
        seen |= code[r];
        line[r] |= static_cast<uint32_t>(code[r]) << (kBits * i);
      }
    }
  }
  for (int64_t r = 0; r < block.plane; ++r) {
    uint32_t* row = words + block.word_offset(r);
    for (int64_t j = 0; j < block.n_count; ++j) row[j] = lines[j][r];
  }
  return seen;
}

template <int kBits>
void unpack_planar_block(const uint32_t* words, uint8_t* codes, const PlanarBlock& block) {
  constexpr int64_t kFields = codes_per_word(kBits);
  constexpr uint32_t kMask = (1u << kBits) - 1;
  uint32_t lines[kBlockN][kMaxPlane];
  for (int64_t r = 0; r < block.plane; ++r) {
    const uint32_t* row = words + block.word_offset(r);
    for (int64_t j = 0; j < block.n_count; ++j) lines[j][r] = row[j];
  }
  for (int64_t j = 0; j < block.n_count; ++j) {
    const uint32_t* line = lines[j];
    for (int64_t i = 0; i < kFields; ++i) {
      const int64_t column = block.column(kFields, i);
      const int64_t count = block.columns_at(column);
      if (count == 0) break;
      uint8_t* code = codes + block.offset(j, column);
      for (int64_t r = 0; r < count; ++r) {
        code[r] = static_cast<uint8_t>((line[r] >> (kBits * i)) & kMask);
      }
    }
  }
}

template <int kBits>
uint8_t pack_planar_impl(const uint8_t* codes, uint32_t* words, int64_t n, int64_t k, int64_t plane,
                         int threads) {
  const int64_t blocks = PlanarBlock::count(n, k, kBits, plane);
  unsigned seen = 0;
#pragma omp parallel for num_threads(threads) reduction(| : seen)
  for (int64_t index = 0; index < blocks; ++index) {
    seen |= pack_planar_block<kBits>(codes, words, PlanarBlock(n, k, plane, index));
  }
  return static_cast<uint8_t>(seen);
}

template <int kBits>
void unpack_planar_impl(const uint32_t* words, uint8_t* codes, int64_t n, int64_t k, int64_t plane,
                        int threads) {
  const int64_t blocks = PlanarBlock::count(n, k, kBits, plane);
#pragma omp parallel for num_threads(threads)
  for (int64_t index = 0; index < blocks; ++index) {
    unpack_planar_block<kBits>(words, codes, PlanarBlock(n, k, plane, index));
  }
}

}  // namespace

uint8_t pack_dense(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t k, int bits,
                   int threads) {
  threads = threads_for(rows * k, threads);
  switch (bits) {
    case 1: return pack_dense_impl<1>(codes, words, rows, k, threads);
    case 2: return pack_dense_impl<2>(codes, words, rows, k, threads);
    case 3: return pack_dense_impl<3>(codes, words, rows, k, threads);
    case 4: return pack_dense_impl<4>(codes, words, rows, k, threads);
    default: assert(bits == 8); return pack_dense_impl<8>(codes, words, rows, k, threads);
  }
}

void unpack_dense(const uint32_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits,
                  int threads) {
  threads = threads_for(rows * k, threads);
  switch (bits) {
    case 1: return unpack_dense_impl<1>(words, codes, rows, k, threads);
    case 2: return unpack_dense_impl<2>(words, codes, rows, k, threads);
    case 3: return unpack_dense_impl<3>(words, codes, rows, k, threads);
    case 4: return unpack_dense_impl<4>(words, codes, rows, k, threads);
    default: assert(bits == 8); return unpack_dense_impl<8>(words, codes, rows, k, threads);
  }
}

uint8_t pack_planar(const uint8_t* codes, uint32_t* words, int64_t n, int64_t k, int bits,
                    int64_t plane, int threads) {
  assert(plane <= kMaxPlane);
  threads = threads_for(n * k, threads);
  switch (bits) {
    case 1: return pack_planar_impl<1>(codes, words, n, k, plane, threads);
    case 2: return pack_planar_impl<2>(codes, words, n, k, plane, threads);
    case 3: return pack_planar_impl<3>(codes, words, n, k, plane, threads);
    default: assert(bits == 4); return pack_planar_impl<4>(codes, words, n, k, plane, threads);
  }
}

void unpack_planar(const uint32_t* words, uint8_t* codes, int64_t n, int64_t k, int bits,
                   int64_t plane, int threads) {
  assert(plane <= kMaxPlane);
  threads = threads_for(n * k, threads);
  switch (bits) {
    case 1: return unpack_planar_impl<1>(words, codes, n, k, plane, threads);
    case 2: return unpack_planar_impl<2>(words, codes, n, k, plane, threads);
    case 3: return unpack_planar_impl<3>(words, codes, n, k, plane, threads);
    default: assert(bits == 4); return unpack_planar_impl<4>(words, codes, n, k, plane, threads);
  }
}

}  // namespace qkernels::cpu
