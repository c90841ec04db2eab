// A kernel for each function of ptx.cuh, which test_ptx.py runs twice: as the PTX that nvcc makes
// of it, by that file's own reading of the PTX ISA, and in the emulator, as a part of
// emulator_selftest.cu. What they leave in `out`, and what they did to memory, must be the same.
//
// One warp runs a kernel. There are no branches, and memory is touched by ptx.cuh alone.

#include <vector>

#include "cuda/ptx.cuh"

namespace qkernels {

struct Arguments {
  const unsigned char* in;
  uint32_t* out;
  int64_t n;
  int mode;
};

#if defined(QKERNELS_EMULATOR)

struct Probe {
  const char* name;
  void (*kernel)(Arguments);
};

inline std::vector<Probe>& probes() {
  static std::vector<Probe> probes;
  return probes;
}

struct AddProbe {
  AddProbe(const char* name, void (*kernel)(Arguments)) { probes().push_back({name, kernel}); }
};

#define PROBE(name)                                       \
  void name(Arguments);                                   \
  static const AddProbe add_##name("probe_" #name, name); \
  void name(Arguments p)

#else

#define PROBE(name) extern "C" __global__ void name(Arguments p)

#endif

namespace probe {

QK_DEVICE int lane() { return static_cast<int>(threadIdx.x); }

// in: rows of 32 words, one for each lane.
QK_DEVICE uint32_t word(const Arguments& p, int row) {
  return ptx::load_global<uint32_t>(p.in + (row * 32 + lane()) * 4);
}

QK_DEVICE float number(const Arguments& p, int row) { return ptx::as_float(word(p, row)); }

// out: the same.
QK_DEVICE void give(const Arguments& p, int row, uint32_t value) {
  ptx::store_global<uint32_t>(p.out + row * 32 + lane(), value);
}

QK_DEVICE void give(const Arguments& p, int row, float value) { give(p, row, ptx::as_bits(value)); }

// --- Integers

PROBE(lop3) {
  const uint32_t a = word(p, 0), b = word(p, 1), c = word(p, 2);
  give(p, 0, ptx::lop3<0xea>(a, b, c));
  give(p, 1, ptx::lop3<0xd8>(a, b, c));
}

PROBE(prmt) { give(p, 0, ptx::prmt(word(p, 0), word(p, 1), word(p, 2))); }

// --- Pairs of 16-bit numbers

PROBE(fma2_half) { give(p, 0, ptx::fma2<Half>(word(p, 0), word(p, 1), word(p, 2))); }

PROBE(fma2_bfloat16) { give(p, 0, ptx::fma2<Bfloat16>(word(p, 0), word(p, 1), word(p, 2))); }

PROBE(sub2_half) { give(p, 0, ptx::sub2<Half>(word(p, 0), word(p, 1))); }

PROBE(sub2_bfloat16) { give(p, 0, ptx::sub2<Bfloat16>(word(p, 0), word(p, 1))); }

PROBE(mul2_half) { give(p, 0, ptx::mul2<Half>(word(p, 0), word(p, 1))); }

PROBE(mul2_bfloat16) { give(p, 0, ptx::mul2<Bfloat16>(word(p, 0), word(p, 1))); }

PROBE(pack2_half) { give(p, 0, ptx::pack2<Half>(number(p, 0), number(p, 1))); }

PROBE(pack2_bfloat16) { give(p, 0, ptx::pack2<Bfloat16>(number(p, 0), number(p, 1))); }

PROBE(to_float_half) {
  give(p, 0, ptx::to_float<Half>(ptx::load_global<uint16_t>(p.in + lane() * 2)));
}

PROBE(to_float_bfloat16) {
  give(p, 0, ptx::to_float<Bfloat16>(ptx::load_global<uint16_t>(p.in + lane() * 2)));
}

// --- fp32 numbers

PROBE(add_single) { give(p, 0, ptx::add(number(p, 0), number(p, 1))); }

PROBE(mul_single) { give(p, 0, ptx::mul(number(p, 0), number(p, 1))); }

PROBE(fma_single) { give(p, 0, ptx::fma(number(p, 0), number(p, 1), number(p, 2))); }

PROBE(divide) { give(p, 0, ptx::divide(number(p, 0), number(p, 1))); }

PROBE(sqrt) { give(p, 0, ptx::sqrt(number(p, 0))); }

// Row 3 has NaN in every other lane.
PROBE(extremes) {
  give(p, 0, ptx::min(number(p, 0), number(p, 1)));
  give(p, 1, ptx::max(number(p, 0), number(p, 1)));
  give(p, 2, ptx::min(number(p, 0), number(p, 3)));
  give(p, 3, ptx::max(number(p, 3), number(p, 0)));
}

// --- What a warp computes together

PROBE(shuffle) {
  give(p, 0, ptx::shuffle_xor(word(p, 0), 1));
  give(p, 1, ptx::shuffle_xor(word(p, 1), 16));
}

// in: a, b, c
template <class T>
QK_DEVICE void multiply(const Arguments& p) {
  const uint32_t a[4] = {word(p, 0), word(p, 1), word(p, 2), word(p, 3)};
  float c[4] = {number(p, 6), number(p, 7), number(p, 8), number(p, 9)};
  ptx::mma_m16n8k16<T>(c, a, word(p, 4), word(p, 5));
  for (int i = 0; i < 4; ++i) give(p, i, c[i]);
}

PROBE(mma_half) { multiply<Half>(p); }

PROBE(mma_bfloat16) { multiply<Bfloat16>(p); }

// Any bytes, and sums that wrap around.
PROBE(mma_bytes) {
  const uint32_t a[4] = {word(p, 0), word(p, 1), word(p, 2), word(p, 3)};
  int32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = static_cast<int32_t>(word(p, 6 + i));
  ptx::mma_m16n8k32(c, a, word(p, 4), word(p, 5));
  for (int i = 0; i < 4; ++i) give(p, i, static_cast<uint32_t>(c[i]));
}

PROBE(movmatrix) { give(p, 0, ptx::movmatrix_trans(word(p, 0))); }

// Each lane puts 16 bytes into shared memory; word 4 says whose it gives to ldmatrix.
PROBE(ldmatrix) {
  unsigned char* const shared = ptx::shared_memory();
  for (int i = 0; i < 4; ++i) {
    ptx::store_shared<uint32_t>(shared + lane() * 16 + i * 4, word(p, i));
  }
  ptx::sync_warp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + word(p, 4) % 32 * 16);
  for (int i = 0; i < 4; ++i) give(p, i, r[i]);
}

// --- Memory

// A word from lane to lane, at addresses of which a part is known once.
PROBE(shared_address) {
  const ptx::Shared begin(ptx::shared_memory());
  const ptx::Shared mine = (begin + lane() * 16).known_once();
  ptx::store_shared<uint32_t>(mine + 12, word(p, 0));
  ptx::sync_warp();
  const int other = ptx::known_once(31 - lane());
  give(p, 0, ptx::load_shared<uint32_t>(begin + 512 + -16 * (31 - other) + -4));
}

template <class V>
QK_DEVICE void move_shared(const Arguments& p) {
  unsigned char* const at = ptx::shared_memory() + lane() * sizeof(V);
  ptx::store_shared(at, ptx::load_global<V>(p.in + lane() * sizeof(V)));
  ptx::sync_threads();
  ptx::store_global(p.out + lane() * 4, ptx::load_shared<V>(at));
}

PROBE(shared_1) { move_shared<uint8_t>(p); }

PROBE(shared_2) { move_shared<uint16_t>(p); }

PROBE(shared_4) { move_shared<uint32_t>(p); }

PROBE(shared_8) { move_shared<uint2>(p); }

PROBE(shared_16) { move_shared<uint4>(p); }

template <class V>
QK_DEVICE void move_written(const Arguments& p) {
  ptx::store_global(p.out + lane() * 4, ptx::load_global_written<V>(p.in + lane() * sizeof(V)));
}

PROBE(written_4) { move_written<uint32_t>(p); }

PROBE(written_8) { move_written<uint2>(p); }

PROBE(written_16) { move_written<uint4>(p); }

// Six copies of 16 bytes, the third of which are zeros beyond lane n; what has landed after each
// wait. A warp does not wait for all of them: the last is under way to the end.
PROBE(copy_async) {
  unsigned char* const shared = ptx::shared_memory() + lane() * 16;
  for (int i = 0; i < 6; ++i) {
    const bool valid = i != 2 || ptx::within(lane(), p.n);
    ptx::copy_async_16(shared + i * 512, p.in + lane() * 16 + i * 512, valid);
    if (i < 5) ptx::copy_async_commit();
  }
  const auto give_landed = [&](int row) {
    for (int i = 0; i < 6; ++i) give(p, row + i, ptx::load_shared<uint32_t>(shared + i * 512 + 4));
  };
  ptx::copy_async_wait<4>();
  give_landed(0);
  ptx::copy_async_wait<3>();
  give_landed(6);
  ptx::copy_async_wait<2>();
  give_landed(12);
  ptx::copy_async_wait<1>();
  give_landed(18);
  ptx::copy_async_wait<0>();
  give_landed(24);
}

PROBE(copy_async_once) {
  unsigned char* const shared = ptx::shared_memory() + lane() * 16;
  ptx::copy_async_16_once(shared, p.in + lane() * 16, ptx::within(lane(), p.n));
  ptx::copy_async_commit();
  ptx::copy_async_wait<0>();
  give(p, 0, ptx::load_shared<uint32_t>(shared + 4));
}

PROBE(prefetch) {
  ptx::prefetch(p.in + lane() * 16, 48);
  give(p, 0, word(p, 0));
}

// --- Order: a counter for each lane, since the order of lanes is not told

PROBE(atomic_add) {
  ptx::atomic_add(p.out + lane(), word(p, 0));
  give(p, 1, ptx::atomic_add(p.out + lane(), word(p, 1)));
}

PROBE(count_block) {
  ptx::count_block(p.out + lane());
  const uint32_t before = ptx::count_block(p.out + lane());
  ptx::sync_threads();
  give(p, 1, before);
}

PROBE(kernels_around) {
  ptx::start_next_kernel();
  ptx::wait_for_kernels_before();
  give(p, 0, word(p, 0));
}

}  // namespace probe
}  // namespace qkernels
