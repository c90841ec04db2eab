// The tile registers of AMX in plain C++, and conversions to bf16, in place of the instructions:
// the kernels on tiles then run wherever AVX-512 does, and sanitizers see what tiles read and
// write. Compiled before csrc/cpu/kernels_amx.cpp (-include), with -DQK_SOFTWARE_TILES for all
// files.
//
// Written from Intel's Software Developer's Manual. What raises a fault there aborts here.

#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace software_tiles {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows, row_bytes;
  unsigned char data[kRows][kRowBytes];
};

struct Registers {
  bool configured = false;
  Tile tiles[kTiles];
};

inline Registers& registers() {
  static thread_local Registers held;
  return held;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "software tiles: %s\n", what);
  std::abort();
}

inline Tile& tile(int index) {
  require(registers().configured, "a tile is used before its configuration is loaded");
  Tile& found = registers().tiles[index];
  require(found.rows > 0 && found.row_bytes > 0, "a tile is used that has no rows or columns");
  return found;
}

inline void load_config(const void* from) {
  unsigned char config[64];
  std::memcpy(config, from, sizeof config);
  require(config[0] == 1, "the palette must be 1");
  for (int i = 0; i < kTiles; ++i) {
    Tile& one = registers().tiles[i];
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * i, 2);
    one.rows = config[48 + i];
    one.row_bytes = row_bytes;
    require(one.rows <= kRows && one.row_bytes <= kRowBytes, "a tile is too large");
    std::memset(one.data, 0, sizeof one.data);
  }
  registers().configured = true;
}

inline void release() { registers().configured = false; }

inline void zero(int index) {
  Tile& to = tile(index);
  std::memset(to.data, 0, sizeof to.data);
}

inline void load(int index, const void* base, int64_t stride) {
  Tile& to = tile(index);
  std::memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r) {
    std::memcpy(to.data[r], static_cast<const char*>(base) + r * stride,
                static_cast<size_t>(to.row_bytes));
  }
}

inline void store(int index, void* base, int64_t stride) {
  const Tile& from = tile(index);
  for (int r = 0; r < from.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, from.data[r],
                static_cast<size_t>(from.row_bytes));
  }
}

inline void check_shapes(const Tile& sums, const Tile& a, const Tile& b) {
  require(sums.rows == a.rows && sums.row_bytes == b.row_bytes && a.row_bytes / 4 == b.rows,
          "the shapes of a product do not fit");
}

// Whole rows at a time, since sanitizers make everything slow; what lies beyond a row's end is
// zero.
#define QK_AVX512 __attribute__((target("avx512f,avx512vnni")))

QK_AVX512 inline __m512i row_of(const Tile& one, int row) {
  return _mm512_loadu_si512(one.data[row]);
}

// Four bytes, in each lane.
QK_AVX512 inline __m512i word_of(const Tile& one, int row, int k) {
  int32_t word;
  std::memcpy(&word, one.data[row] + 4 * k, 4);
  return _mm512_set1_epi32(word);
}

// sums[m][n] += sum of a[m][4k + i] * b[k][4n + i]: a signed, b unsigned; sums wrap.
QK_AVX512 inline void dot_signed_unsigned(Tile& sums, const Tile& a, const Tile& b) {
  for (int m = 0; m < sums.rows; ++m) {
    __m512i sum = row_of(sums, m);
    for (int k = 0; k < b.rows; ++k) {
      sum = _mm512_dpbusd_epi32(sum, row_of(b, k), word_of(a, m, k));
    }
    _mm512_storeu_si512(sums.data[m], sum);
  }
}

// sums[m][n] += (sum of a[m][2k] * b[k][2n]) + (sum of a[m][2k + 1] * b[k][2n + 1]), in fp32.
QK_AVX512 inline void dot_bf16(Tile& sums, const Tile& a, const Tile& b) {
  const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
  for (int m = 0; m < sums.rows; ++m) {
    __m512 parts[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < b.rows; ++k) {
      const __m512i left = word_of(a, m, k), right = row_of(b, k);
      parts[0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                                 _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), parts[0]);
      parts[1] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                                 _mm512_castsi512_ps(_mm512_and_si512(right, upper)), parts[1]);
    }
    const __m512 sum = _mm512_castsi512_ps(row_of(sums, m));
    _mm512_storeu_ps(sums.data[m], _mm512_add_ps(sum, _mm512_add_ps(parts[0], parts[1])));
  }
}

inline void multiply_bytes(int sums, int a, int b) {
  check_shapes(tile(sums), tile(a), tile(b));
  dot_signed_unsigned(tile(sums), tile(a), tile(b));
}

inline void multiply_bf16(int sums, int a, int b) {
  check_shapes(tile(sums), tile(a), tile(b));
  dot_bf16(tile(sums), tile(a), tile(b));
}

// Half to even; numbers below the normal ones become zero.
inline uint16_t rounded_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (magnitude < 0x00800000) return static_cast<uint16_t>(bits >> 16 & 0x8000);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void round_sixteen(const float* from, uint16_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = rounded_to_bf16(from[i]);
}

QK_AVX512 inline __m256bh to_bf16(__m512 x) {
  float from[16];
  _mm512_storeu_ps(from, x);
  uint16_t to[16];
  round_sixteen(from, to);
  __m256bh out;
  std::memcpy(&out, to, sizeof out);
  return out;
}

// The numbers of `low` come first.
QK_AVX512 inline __m512bh to_bf16(__m512 high, __m512 low) {
  float from[2][16];
  _mm512_storeu_ps(from[0], low);
  _mm512_storeu_ps(from[1], high);
  uint16_t to[32];
  round_sixteen(from[0], to);
  round_sixteen(from[1], to + 16);
  __m512bh out;
  std::memcpy(&out, to, sizeof out);
  return out;
}

}  // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _tile_loadconfig software_tiles::load_config
#define _tile_release software_tiles::release
#define _tile_zero software_tiles::zero
#define _tile_loadd software_tiles::load
#define _tile_stored software_tiles::store
#define _tile_dpbsud software_tiles::multiply_bytes
#define _tile_dpbf16ps software_tiles::multiply_bf16
#define _mm512_cvtneps_pbh software_tiles::to_bf16
#define _mm512_cvtne2ps_pbh software_tiles::to_bf16

#endif
