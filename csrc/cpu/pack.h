// Codes of 1, 2, 3, 4 or 8 bits, one per byte, packed into 32-bit words and unpacked again.
//
// Dense, 1, 2, 3, 4 and 8 bits: each row is one little-endian bit stream along K. Code k lies at
// bit k*bits of its row; a 3-bit code may straddle two words. A row takes dense_words(k, bits)
// words.
//
//     word 0                              word 1
//     | c0 | c1 | c2 | ... | c10 (low 2)  | c10 (high 1) | c11 | ...        3 bits
//
// Planar, 1, 2, 3 and 4 bits: a word holds V = 32 / bits codes whose columns are `plane` apart, and
// words of the same column lie side by side along N. K is padded to whole tiles of V * plane.
//
//     word (t*plane + r, n), bits [bits*i, bits*(i+1)) = code[n, t*V*plane + i*plane + r]
//
// Bits that belong to no code are 0. Buffers are row-major and contiguous.

#pragma once

#include <cstdint>

#include "integers.h"

namespace qkernels::cpu {

constexpr int64_t dense_words(int64_t k, int bits) { return ceil_div(k * bits, 32); }

constexpr int64_t codes_per_word(int bits) { return 32 / bits; }

// Rows of the planar words of k columns.
constexpr int64_t planar_rows(int64_t k, int bits, int64_t plane) {
  return ceil_div(k, codes_per_word(bits) * plane) * plane;
}

// Packing returns the bitwise or of all codes, by which the caller sees codes that do not fit;
// what is written for those is undefined. At most `threads` threads work.

// codes [rows, k] -> words [rows, dense_words(k, bits)]
uint8_t pack_dense(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t k, int bits,
                   int threads);

// words [rows, dense_words(k, bits)] -> codes [rows, k]
void unpack_dense(const uint32_t* words, uint8_t* codes, int64_t rows, int64_t k, int bits,
                  int threads);

// codes [n, k] -> words [planar_rows(k, bits, plane), n]
uint8_t pack_planar(const uint8_t* codes, uint32_t* words, int64_t n, int64_t k, int bits,
                    int64_t plane, int threads);

// words [planar_rows(k, bits, plane), n] -> codes [n, k]
void unpack_planar(const uint32_t* words, uint8_t* codes, int64_t n, int64_t k, int bits,
                   int64_t plane, int threads);

}  // namespace qkernels::cpu
