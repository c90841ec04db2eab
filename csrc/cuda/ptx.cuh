// Every PTX instruction and every access to memory that the kernels make, one function each.
//
// Two bodies: this file on a GPU, emulator/ptx.h where the kernels are compiled for the CPU, for
// tests. So a kernel uses these functions and no intrinsic, `asm` or `__shared__` of its own.
//
// QK_SITE is an argument that tells the emulator where a call stands; on a GPU it is nothing.

#pragma once

#include <cstdint>

#if defined(QKERNELS_EMULATOR)
#include "emulator/ptx.h"
#else

#include <cuda_runtime.h>

#define QK_DEVICE __device__ __forceinline__
#define QK_HOST_DEVICE __host__ __device__ __forceinline__
#define QK_KERNEL __global__
#define QK_SITE
#define QK_AND_SITE
// Threads of a block and the least number of blocks on a multiprocessor.
#define QK_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define QK_GRID_CONSTANT __grid_constant__

namespace qkernels {

// The two 16-bit types, by their bits.
struct Half {};
struct Bfloat16 {};

#if defined(__CUDACC__)  // the bindings, which a C++ compiler reads, need no more
namespace ptx {

// --- Integers

// The bitwise function of three words whose truth table is `kTable` (0xf0, 0xcc, 0xaa are a, b, c).
template <int kTable>
QK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Four bytes chosen from a (0..3) and b (4..7) by the nibbles of `selector`, lowest first.
QK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// --- Pairs of 16-bit numbers in a word: one rounding to nearest even an operation, subnormals kept

template <class T>
QK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);

template <>
QK_DEVICE uint32_t fma2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

template <>
QK_DEVICE uint32_t fma2<Bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// a - b
template <class T>
QK_DEVICE uint32_t sub2(uint32_t a, uint32_t b);

template <>
QK_DEVICE uint32_t sub2<Half>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
QK_DEVICE uint32_t sub2<Bfloat16>(uint32_t a, uint32_t b) {
  // sm_80 has no subtraction of bf16; a + (-1) * b rounds the same.
  return fma2<Bfloat16>(b, 0xbf80bf80u, a);
}

template <class T>
QK_DEVICE uint32_t mul2(uint32_t a, uint32_t b);

template <>
QK_DEVICE uint32_t mul2<Half>(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

template <>
QK_DEVICE uint32_t mul2<Bfloat16>(uint32_t a, uint32_t b) {
  // Adding -0 changes no sum, nor the sign of a zero product.
  return fma2<Bfloat16>(a, b, 0x80008000u);
}

// Two fp32 numbers, rounded; `low` in the low half of the word.
template <class T>
QK_DEVICE uint32_t pack2(float low, float high);

template <>
QK_DEVICE uint32_t pack2<Half>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <>
QK_DEVICE uint32_t pack2<Bfloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// The fp32 number of a 16-bit one, exact.
template <class T>
QK_DEVICE float to_float(uint16_t bits);

template <>
QK_DEVICE float to_float<Half>(uint16_t bits) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
  return d;
}

template <>
QK_DEVICE float to_float<Bfloat16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

QK_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

QK_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// The same value, which the compiler cannot compute anew: it would, inside of a loop, where that
// takes a few instructions from what it knows.
QK_DEVICE int known_once(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// --- fp32 numbers: one rounding to nearest even an operation, never two contracted to one

QK_DEVICE float add(float a, float b) {
  float d;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

QK_DEVICE float mul(float a, float b) {
  float d;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

QK_DEVICE float fma(float a, float b, float c) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

QK_DEVICE float divide(float a, float b) {
  float d;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

QK_DEVICE float sqrt(float a) {
  float d;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}

// Where one of them is NaN, the other one.
QK_DEVICE float min(float a, float b) {
  float d;
  asm("min.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

QK_DEVICE float max(float a, float b) {
  float d;
  asm("max.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// --- Shared memory

// An address in shared memory, of 32 bits: a pointer takes two registers, and each access with it
// an instruction or two more.
struct Shared {
  uint32_t address;

  Shared() = default;
  QK_DEVICE Shared(const void* pointer)  // NOLINT: pointers are addresses
      : address(static_cast<uint32_t>(__cvta_generic_to_shared(pointer))) {}
  QK_DEVICE Shared operator+(int bytes) const { return Shared(address + bytes); }
  QK_DEVICE Shared known_once() const { return Shared(ptx::known_once(address)); }

 private:
  QK_DEVICE explicit Shared(uint32_t known) : address(known) {}
};

// The block's dynamic shared memory, aligned to 128 bytes.
QK_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char qkernels_shared_memory[];
  return qkernels_shared_memory;
}

// V is a type of 1, 2 or 4 bytes, uint2 or uint4, and the address is aligned to its size.
template <class V>
QK_DEVICE V load_shared(Shared from QK_AND_SITE) {
  return *static_cast<const V*>(__cvta_shared_to_generic(from.address));
}

// An instruction each: where words are computed one by one, nvcc stores what is assigned as a
// structure one by one too.
template <class V>
QK_DEVICE void store_shared(Shared to, const V& value QK_AND_SITE) {
  if constexpr (sizeof(V) <= 4) {
    *static_cast<V*>(__cvta_shared_to_generic(to.address)) = value;
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to.address), "r"(value.x), "r"(value.y)
                 : "memory");
  } else {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to.address), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
  }
}

// --- Tensor cores: called by all 32 lanes of a warp together

// c [16, 8] += a [16, 16] @ b [16, 8], accumulated in fp32. With group = lane / 4 and t = lane % 4:
//   a[0], a[1], a[2], a[3]   rows group, group + 8, group, group + 8;
//                            columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3])
//   b[0], b[1]               rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column `group`
//   c[0], c[1]; c[2], c[3]   columns 2t, 2t + 1 of row group; of row group + 8
template <class T>
QK_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
QK_DEVICE void mma_m16n8k16<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
QK_DEVICE void mma_m16n8k16<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 32] @ b [32, 8] of signed bytes, in int32, which wraps around. With group and
// t as above, byte i of
//   a[0], a[1]; a[2], a[3]   is column 4t + i of row group, group + 8; column 4t + 16 + i of these
//   b[0], b[1]               is row 4t + i, 4t + 16 + i of column `group`
// and c is as above.
QK_DEVICE void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The transpose of an 8x8 matrix of 16-bit numbers: lane 4i + t passes columns 2t, 2t + 1 of row i,
// and has those of row i of the transpose.
QK_DEVICE uint32_t movmatrix_trans(uint32_t a QK_AND_SITE) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane 8i + j passes the address of row j
// of matrix i (16 bytes, aligned); r[i] of a lane is columns 2t, 2t + 1 of row lane / 4 of it.
QK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared row QK_AND_SITE) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

// --- Global memory

// For memory that nobody writes during the kernel.
template <class V>
QK_DEVICE V load_global(const void* address QK_AND_SITE) {
  return __ldg(static_cast<const V*>(address));
}

// For memory that other blocks of this kernel have written: past the first-level cache.
template <class V>
QK_DEVICE V load_global_written(const void* address QK_AND_SITE) {
  return __ldcg(static_cast<const V*>(address));
}

// An instruction each, as in shared memory.
template <class V>
QK_DEVICE void store_global(void* address, const V& value QK_AND_SITE) {
  if constexpr (sizeof(V) <= 4) {
    *static_cast<V*>(address) = value;
  } else {
    const size_t to = __cvta_generic_to_global(address);
    if constexpr (sizeof(V) == 8) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(value.x), "r"(value.y)
                   : "memory");
    } else {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
                   "r"(value.z), "r"(value.w)
                   : "memory");
    }
  }
}

// --- Asynchronous copies of 16 bytes from global to shared memory

// Where `valid` is false, writes 16 zeros and reads nothing.
QK_DEVICE void copy_async_16(Shared to, const void* global, bool valid QK_AND_SITE) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(global),
               "r"(bytes)
               : "memory");
}

// The same, of memory that is read once: the first to leave the second-level cache. On sm_90, where
// that takes no instruction; elsewhere it takes one a copy or two.
QK_DEVICE void copy_async_16_once(Shared to, const void* global, bool valid QK_AND_SITE) {
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
  const int bytes = valid ? 16 : 0;
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to.address),
               "l"(global), "r"(bytes), "l"(policy)
               : "memory");
#else
  copy_async_16(to, global, valid);
#endif
}

// Ends a group of copies of this thread.
QK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kGroups` of this thread's latest groups are still under way.
template <int kGroups>
QK_DEVICE void copy_async_wait(QK_SITE) {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// --- Order

QK_DEVICE void sync_threads(QK_SITE) { __syncthreads(); }

QK_DEVICE void sync_warp(QK_SITE) { __syncwarp(); }

QK_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}

// Counts this block as arrived, and returns how many had before it; releases and acquires. By this
// a block tells others that what its threads have stored before a barrier is there, and after
// another barrier they read what the others had stored.
QK_DEVICE uint32_t count_block(uint32_t* counter QK_AND_SITE) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// --- The kernels before and behind this one in the stream, where it was started by launch_early
// (launch.cuh): the next one may then begin before this one has ended. From sm_90 on; else nothing.

// The next kernel may begin, as soon as every block has called this or ended.
QK_DEVICE void start_next_kernel(QK_SITE) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before have ended and what they wrote is there. Before it a kernel
// touches no global memory.
QK_DEVICE void wait_for_kernels_before(QK_SITE) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Begins to bring memory to the second-level cache, which is right at any time: there it changes
// with what is written. Address and size are multiples of 16 bytes.
QK_DEVICE void prefetch(const void* address, uint32_t bytes QK_AND_SITE) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}

// --- Words that lanes exchange: called by all 32 lanes of a warp together

// `value` of lane ^ mask.
QK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask QK_AND_SITE) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// --- Bounds

// Every mask of a load or store asks this, so that a test can take one away.
QK_DEVICE bool within(int64_t index, int64_t limit QK_AND_SITE) { return index < limit; }

}  // namespace ptx
#endif
}  // namespace qkernels

#endif
