// The emulator's bodies of ptx.cuh, which says what each function does.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator/accesses.h"
#include "emulator/builtins.h"
#include "emulator/collectives.h"
#include "emulator/numbers.h"
#include "emulator/scheduler.h"

#define QK_DEVICE inline
#define QK_HOST_DEVICE inline
#define QK_KERNEL
#define QK_LAUNCH_BOUNDS(threads, blocks)
#define QK_GRID_CONSTANT
// Default arguments are evaluated where the function is called, and so name that line.
#define QK_SITE ::qkernels::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}
#define QK_AND_SITE , QK_SITE

namespace qkernels {

struct Half {
  static uint16_t round(double x) { return emulator::round_to_16<10>(x); }
  static float to_float(uint16_t bits) { return emulator::half_to_float(bits); }
  static void multiply(void* const* operands) { emulator::multiply_half(operands); }
};

struct Bfloat16 {
  static uint16_t round(double x) { return emulator::round_to_16<7>(x); }
  static float to_float(uint16_t bits) { return emulator::bfloat16_to_float(bits); }
  static void multiply(void* const* operands) { emulator::multiply_bfloat16(operands); }
};

namespace ptx {

// --- Integers

template <int kTable>
QK_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int row = 0; row < 8; ++row) {
    if ((kTable >> row & 1) == 0) continue;
    d |= ((row & 4) != 0 ? a : ~a) & ((row & 2) != 0 ? b : ~b) & ((row & 1) != 0 ? c : ~c);
  }
  return d;
}

QK_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 0xf;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7)) & 0xff);
    if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;  // copies of the sign bit
    d |= byte << (8 * i);
  }
  return d;
}

// --- Pairs of 16-bit numbers in a word

template <class T>
QK_DEVICE uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto number = [shift](uint32_t word) -> double {
      return T::to_float(static_cast<uint16_t>(word >> shift));
    };
    // The product is exact; T::round is then the only rounding.
    const double sum = emulator::add_to_odd(number(a) * number(b), number(c));
    d |= static_cast<uint32_t>(T::round(sum)) << shift;
  }
  return d;
}

template <class T>
QK_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double x = T::to_float(static_cast<uint16_t>(a >> shift));
    const double y = T::to_float(static_cast<uint16_t>(b >> shift));
    d |= static_cast<uint32_t>(T::round(emulator::add_to_odd(x, -y))) << shift;
  }
  return d;
}

template <class T>
QK_DEVICE uint32_t mul2(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const double x = T::to_float(static_cast<uint16_t>(a >> shift));
    const double y = T::to_float(static_cast<uint16_t>(b >> shift));
    d |= static_cast<uint32_t>(T::round(x * y)) << shift;
  }
  return d;
}

template <class T>
QK_DEVICE uint32_t pack2(float low, float high) {
  return static_cast<uint32_t>(T::round(high)) << 16 | T::round(low);
}

template <class T>
QK_DEVICE float to_float(uint16_t bits) {
  return T::to_float(bits);
}

QK_DEVICE float as_float(uint32_t bits) { return emulator::bits_to<float>(bits); }

QK_DEVICE uint32_t as_bits(float value) { return emulator::bits_to<uint32_t>(value); }

QK_DEVICE int known_once(int value) { return value; }

// --- fp32 numbers

QK_DEVICE float add(float a, float b) { return a + b; }

QK_DEVICE float mul(float a, float b) { return a * b; }

QK_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }

QK_DEVICE float divide(float a, float b) { return a / b; }

QK_DEVICE float sqrt(float a) { return std::sqrt(a); }

// Not std::fmin, which gives NaN for signaling ones.
QK_DEVICE float min(float a, float b) {
  if (a != a) return b;
  if (a == b) return std::signbit(a) ? a : b;
  return b < a ? b : a;
}

QK_DEVICE float max(float a, float b) { return -min(-a, -b); }

// --- Shared memory

struct Shared {
  unsigned char* at;

  Shared() = default;
  QK_DEVICE Shared(const void* pointer)  // NOLINT: pointers are addresses
      : at(const_cast<unsigned char*>(static_cast<const unsigned char*>(pointer))) {}
  QK_DEVICE Shared operator+(int bytes) const { return Shared(at + bytes); }
  QK_DEVICE Shared known_once() const { return *this; }
};

QK_DEVICE unsigned char* shared_memory() { return emulator::shared_memory(); }

template <class V>
constexpr bool kIsAccess = sizeof(V) <= 16 && (sizeof(V) & (sizeof(V) - 1)) == 0;

template <class V>
QK_DEVICE V load_shared(Shared from QK_AND_SITE) {
  static_assert(kIsAccess<V>);
  V value{};
  if (emulator::before_shared(emulator::Kind::kLoadShared, from.at, sizeof(V), place)) {
    std::memcpy(&value, from.at, sizeof(V));
  }
  return value;
}

template <class V>
QK_DEVICE void store_shared(Shared to, const V& value QK_AND_SITE) {
  static_assert(kIsAccess<V>);
  if (emulator::before_shared(emulator::Kind::kStoreShared, to.at, sizeof(V), place)) {
    std::memcpy(to.at, &value, sizeof(V));
  }
}

// --- Tensor cores

template <class T>
QK_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                            uint32_t b1 QK_AND_SITE) {
  emulator::MmaOperands operands{c, a, {b0, b1}};
  emulator::meet_warp(emulator::Kind::kMma, &operands, T::multiply, place);
}

QK_DEVICE void mma_m16n8k32(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                            uint32_t b1 QK_AND_SITE) {
  emulator::IntegerMmaOperands operands{c, a, {b0, b1}};
  emulator::meet_warp(emulator::Kind::kMma, &operands, emulator::multiply_bytes, place);
}

QK_DEVICE uint32_t movmatrix_trans(uint32_t a QK_AND_SITE) {
  uint32_t d = 0;
  emulator::MovmatrixOperands operands{&d, a};
  emulator::meet_warp(emulator::Kind::kMovmatrix, &operands, emulator::transpose_matrix, place);
  return d;
}

QK_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared row QK_AND_SITE) {
  if (!emulator::before_shared(emulator::Kind::kLdmatrix, row.at, 16, place)) {
    for (uint32_t& each : r) each = 0;
  }
  emulator::LdmatrixOperands operands{r, row.at};
  emulator::meet_warp(emulator::Kind::kLdmatrix, &operands, emulator::load_matrices, place);
}

// --- Global memory

template <class V>
QK_DEVICE V load_global(const void* address QK_AND_SITE) {
  static_assert(kIsAccess<V>);
  V value{};
  if (emulator::before_global(emulator::Kind::kLoadGlobal, address, sizeof(V), place)) {
    std::memcpy(&value, address, sizeof(V));
  }
  return value;
}

template <class V>
QK_DEVICE V load_global_written(const void* address QK_AND_SITE) {
  static_assert(kIsAccess<V>);
  V value{};
  if (emulator::before_global(emulator::Kind::kLoadGlobalWritten, address, sizeof(V), place)) {
    std::memcpy(&value, address, sizeof(V));
  }
  return value;
}

template <class V>
QK_DEVICE void store_global(void* address, const V& value QK_AND_SITE) {
  static_assert(kIsAccess<V>);
  if (emulator::before_global(emulator::Kind::kStoreGlobal, address, sizeof(V), place)) {
    std::memcpy(address, &value, sizeof(V));
  }
}

// --- Asynchronous copies

QK_DEVICE void copy_async_16(Shared to, const void* global, bool valid QK_AND_SITE) {
  emulator::copy_async_16(to.at, global, valid, place);
}

QK_DEVICE void copy_async_16_once(Shared to, const void* global, bool valid QK_AND_SITE) {
  emulator::copy_async_16(to.at, global, valid, place);
}

QK_DEVICE void copy_async_commit(QK_SITE) { emulator::copy_async_commit(place); }

template <int kGroups>
QK_DEVICE void copy_async_wait(QK_SITE) {
  emulator::copy_async_wait(kGroups, place);
}

// --- Order

QK_DEVICE void sync_threads(QK_SITE) { emulator::sync_threads(place); }

QK_DEVICE void sync_warp(QK_SITE) {
  emulator::meet_warp(emulator::Kind::kSyncWarp, nullptr, nullptr, place);
}

QK_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value QK_AND_SITE) {
  if (!emulator::before_global(emulator::Kind::kAtomicAdd, address, sizeof(*address), place)) {
    return 0;
  }
  const uint32_t before = *address;
  *address = before + value;
  return before;
}

QK_DEVICE uint32_t count_block(uint32_t* counter QK_AND_SITE) {
  if (!emulator::before_global(emulator::Kind::kCountBlock, counter, sizeof(*counter), place)) {
    return 0;
  }
  return (*counter)++;
}

// --- The kernels before and behind this one in the stream

QK_DEVICE void start_next_kernel(QK_SITE) { emulator::start_next_kernel(place); }

QK_DEVICE void wait_for_kernels_before(QK_SITE) { emulator::wait_for_kernels_before(place); }

QK_DEVICE void prefetch(const void* address, uint32_t bytes QK_AND_SITE) {
  emulator::prefetch(address, bytes, place);
}

// --- Words that lanes exchange

QK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask QK_AND_SITE) {
  emulator::ShuffleOperands operands{value, mask};
  emulator::meet_warp(emulator::Kind::kShuffle, &operands, emulator::shuffle, place);
  return operands.value;
}

// --- Bounds

QK_DEVICE bool within(int64_t index, int64_t limit QK_AND_SITE) {
  return emulator::within(index, limit, place);
}

}  // namespace ptx
}  // namespace qkernels
