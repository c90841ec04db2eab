// Codes, AWQ words and GPTQ words into the fragment layout, codes into fragment_int8, and both back
// to codes. All functions return null, or what went wrong in words.

#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace qkernels {

// Where packing takes codes from.
enum class CodeSource : int {
  kCodes,  // uint8 [rows, k]
  kAwq,    // int32 [k, n / 8]: AutoAWQ's order, 4 bits
  kGptq,   // int32 [k * bits / 32, n]: little-endian along k
};

struct PackArguments {
  const void* source;
  const int32_t* perm;      // column j of the layout is column perm[j] of the source; or null
  void* words;              // the whole weight's
  int64_t n, k;             // of the whole weight
  int64_t first_row, rows;  // what to pack; first_row a multiple of 32; kCodes holds just these
  int bits;
  CodeSource kind;
};

const char* pack_fragment(const PackArguments& arguments, Stream stream);

// Into fragment_int8: kCodes alone, of 4 or 8 bits, without perm; padding columns repeat the last.
const char* pack_fragment_int8(const PackArguments& arguments, Stream stream);

// codes uint8 [rows, k] of the rows from first_row on, any row.
const char* unpack_fragment(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                            int64_t rows, int bits, Stream stream);

const char* unpack_fragment_int8(const void* words, uint8_t* codes, int64_t k, int64_t first_row,
                                 int64_t rows, int bits, Stream stream);

}  // namespace qkernels
