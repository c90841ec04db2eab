#include "cases.h"

#include <algorithm>
#include <thread>

#include "cpu/vnni.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

void run_on_new_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  body(context);
  for (auto& other : others) other.join();
}

// Packs and unpacks, all rows and some from the middle on; what comes back must be what went in.
void make_packing(const Options& options, Random& random, const Take& take) {
  for (bool nibbles : {true, false}) {
    for (auto [n, k] : {std::pair{1, 1}, {16, 72}, {49, 135}, {80, 321}}) {
      const Bytes codes = random.bytes(n * k, 0, nibbles ? 16 : 256);
      const int64_t rows = n, columns = k, first = rows / 2;
      const auto run = [=](const Schedule&, const Pool& pool) {
        const int64_t words = qkernels::ceil_div(rows, kLanes) * kLanes * padded_columns(columns);
        std::vector<uint32_t> packed(static_cast<size_t>(words / (nibbles ? 8 : 4)), ~0u);
        pack_vnni(codes.data(), packed.data(), rows, columns, nibbles, pool);
        Bytes back = unwritten(rows * columns, 1), some = unwritten((rows - first) * columns, 1);
        unpack_vnni(packed.data(), back.data(), 0, rows, columns, nibbles, pool);
        unpack_vnni(packed.data(), some.data(), first, rows - first, columns, nibbles, pool);
        back.insert(back.end(), some.begin(), some.end());
        return back;
      };
      const auto complaint = [=](const Bytes& back, const Schedule&) -> std::string {
        Bytes want = codes;
        want.insert(want.end(), codes.begin() + first * columns, codes.end());
        return back == want ? "" : "other codes come back than went in";
      };
      const std::string name = "vnni n " + std::to_string(n) + " k " + std::to_string(k);
      take(
          [&]() -> Case { return {name, {{options.isas.front(), false, false}}, run, complaint}; });
    }
  }
}

}  // namespace

void make_all(const Options& options, const Take& take) {
  Random random(20240607);
  make_packing(options, random, take);
  make_products(options, random, take);
  make_rows(options, random, take);
  make_embeddings(options, random, take);
  make_calibration(options, random, take);
  make_blocks(options, random, take);
  make_kept(options, random, take);
  make_sparse(options, random, take);
  make_outliers(options, take);
  make_outputs(options, random, take);
}

std::vector<Isa> runnable(const std::vector<std::string>& names) {
  std::vector<Isa> isas;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const auto named = std::find(names.begin(), names.end(), qkernels::cpu::name_of(isa));
    const bool is_wanted = names.empty() || named != names.end();
    if (is_wanted && why_not_here(isa) == nullptr) isas.push_back(isa);
  }
  return isas;
}

const char* why_not_here(Isa isa) {
#ifdef QK_SOFTWARE_TILES
  if (isa == Isa::kAmx) isa = Isa::kAvx512;
#endif
  return qkernels::cpu::why_not(isa);
}

Pool pool_of(int threads) { return {threads, run_on_new_threads}; }

std::string name_of(const Case& one, const Schedule& schedule) {
  return one.name + " on " + qkernels::cpu::name_of(schedule.isa) +
         (schedule.tiles ? " tiles" : "") + (schedule.rounds_weights ? " rounded" : "") +
         (schedule.pairs ? " pairs" : "");
}

}  // namespace cases
