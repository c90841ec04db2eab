// Which instructions this machine has, and which of the kernels may use.

#pragma once

namespace qkernels::cpu {

// Each level includes those before it.
enum class Isa {
  kPortable,  // plain C++, on every machine
  kAvx2,      // AVX2, FMA, F16C
  kAvx512,    // AVX-512 F, BW, DQ, VL and VNNI
  kAmx,       // AMX tiles, bf16 and int8, with the operating system's permission
};

constexpr int kIsaCount = 4;

const char* name_of(Isa isa);

// Whether products of pairs of bf16 belong to its AVX-512, as they do wherever there is AMX.
bool has_bf16_products();

// The highest level that this machine runs; asks the system for AMX once.
Isa detected_isa();

// Why this machine does not run `isa`, or null. The text lives for ever.
const char* why_not(Isa isa);

}  // namespace qkernels::cpu
