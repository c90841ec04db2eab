// Codes, one a byte, into the words of the CPU kernels and back; drawn in weight.h.

#pragma once

#include <cstdint>

#include "cpu/parallel.h"

namespace qkernels::cpu {

// codes [rows, k] into the panels from words on; rows and columns beyond them become zero codes.
// With `nibbles`, codes are below 16.
void pack_vnni(const uint8_t* codes, uint32_t* words, int64_t rows, int64_t k, bool nibbles,
               const Pool& pool);

// Rows [first, first + rows) of words to codes [rows, k].
void unpack_vnni(const uint32_t* words, uint8_t* codes, int64_t first, int64_t rows, int64_t k,
                 bool nibbles, const Pool& pool);

}  // namespace qkernels::cpu
