// What a warp computes together once its 32 lanes have met.

#pragma once

#include <cstdint>

namespace qkernels::emulator {

struct MmaOperands {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

struct IntegerMmaOperands {
  int32_t* c;         // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};

struct LdmatrixOperands {
  uint32_t* r;  // [4]
  const void* row;
};

struct MovmatrixOperands {
  uint32_t* d;
  uint32_t a;
};

struct ShuffleOperands {
  uint32_t value;
  int mask;
};

// c [16, 8] += a [16, 16] @ b [16, 8]: each product is exact in fp32, and they are added to c one
// by one in the order of k, in fp32. (Tensor cores add in an order of their own, with other
// roundings.)
void multiply_half(void* const* operands_of_lanes);
void multiply_bfloat16(void* const* operands_of_lanes);

// c [16, 8] += a [16, 32] @ b [32, 8] of signed bytes, modulo 2^32.
void multiply_bytes(void* const* operands_of_lanes);

// Four 8x8 matrices; lane 8i + j has the address of row j of matrix i.
void load_matrices(void* const* operands_of_lanes);

// The transpose of an 8x8 matrix, of which each lane has two numbers of a row.
void transpose_matrix(void* const* operands_of_lanes);

// The value of lane ^ mask, for each lane.
void shuffle(void* const* operands_of_lanes);

}  // namespace qkernels::emulator
