// Which instructions this machine has, and which of the kernels may use.

#pragma once

namespace qkernels::cpu {

// Each level includes those before it of the same kind of CPU.
enum class Isa {
  kPortable,  // plain C++, on every machine
  // x86
  kAvx2,    // AVX2, FMA, F16C
  kAvx512,  // AVX-512 F, BW, DQ, VL and VNNI
  kAmx,     // AMX tiles, bf16 and int8, with the operating system's permission
  // 64-bit Arm
  kNeon,      // what every one has: vectors, conversions of fp16
  kNeonDot,   // dot products of signed bytes
  kNeonI8mm,  // dot products of bytes of which one is unsigned, products of matrices of bytes
};

constexpr int kIsaCount = 7;

const char* name_of(Isa isa);

// Whether there are products of pairs of bf16: beside AVX-512, as wherever there is AMX, or beside
// I8MM.
bool has_bf16_products();

// Whether there are dot products of bytes on 256 bits in the encoding of AVX2, which CPUs have
// beside it that have no AVX-512: AVX-VNNI.
bool has_avx_vnni();

// The highest level that this machine runs; asks the system for AMX once.
Isa detected_isa();

// Why this machine does not run `isa`, or null. The text lives for ever.
const char* why_not(Isa isa);

}  // namespace qkernels::cpu
