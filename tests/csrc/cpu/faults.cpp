// The kernels with a deliberate fault of csrc/cpu/faults.h, or with none:
//
//     faults isa [fault]
//
// With a fault, ends at the first wrong result. Without one, all must be right, and the name of
// each fault that the cases come by is printed. Ends with 0 where all results are right, with 1
// where one is not, and with 2 where this machine does not run the instructions, with the reason.

#include "cpu/faults.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "cases.h"

namespace {

// Large enough for a split of K, several tasks of panels and several blocks of rows.
constexpr int64_t kMostProducts = 1 << 20;

struct Faults {
  std::mutex mutex;
  std::string wanted;
  std::set<std::string> asked_for;
};

Faults& faults() {
  static Faults held;
  return held;
}

}  // namespace

bool qkernels::cpu::fault_is_on(const char* name) {
  const std::lock_guard<std::mutex> lock(faults().mutex);
  faults().asked_for.insert(name);
  return faults().wanted == name;
}

int main(int count, char** arguments) {
  using qkernels::cpu::Isa;
  if (count < 2 || count > 3) return 3;
  const std::string name = arguments[1];
  for (int i = 0; i < qkernels::cpu::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != qkernels::cpu::name_of(isa) || cases::why_not_here(isa) == nullptr) continue;
    std::printf("%s\n", cases::why_not_here(isa));
    return 2;
  }
  if (count == 3) faults().wanted = arguments[2];

  cases::Options options;
  options.isas = cases::runnable({name});
  options.most_products = kMostProducts;
  cases::make_all(options, [](const std::function<cases::Case()>& make) {
    const cases::Case one = make();
    for (const auto& schedule : one.schedules) {
      std::string complaint;
      try {
        complaint = one.complaint(one.run(schedule, cases::pool_of(2)), schedule);
      } catch (const std::bad_alloc&) {
        complaint = "there is no memory";
      }
      if (complaint.empty()) continue;
      std::printf("%s: %s\n", name_of(one, schedule).c_str(), complaint.c_str());
      std::exit(1);
    }
  });
  if (count == 2) {
    for (const std::string& fault : faults().asked_for) std::printf("%s\n", fault.c_str());
  }
  return 0;
}
