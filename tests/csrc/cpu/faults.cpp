// The kernels with the deliberate faults of csrc/cpu/faults.h:
//
//     faults isa [prefix]
//
// Runs each case without a fault, and with each fault that it comes by and no case before noticed;
// of faults, those whose names begin with `prefix`. Prints what became of each fault that a case
// came by: noticed, where a result was wrong; missed, where none was; or the signal that ended its
// process. Ends with 0, with 1 where a result is wrong without a fault, and with 2 where this
// machine does not run the instructions, with the reason.

#include "cpu/faults.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <thread>

#include "cases.h"

using cases::Bytes;
using cases::Case;
using qkernels::cpu::Fault;
using qkernels::cpu::Schedule;

namespace {

// Large enough for a split of K, several tasks of panels and several blocks of rows.
constexpr int64_t kMostProducts = 1 << 20;
// Far more than a case takes with a fault that does not loop for ever.
constexpr unsigned kSeconds = 300;

struct Faults {
  std::mutex mutex;
  std::map<std::string, Fault> called;
};

Faults& faults() {
  static Faults held;
  return held;
}

// On threads of its own, whose scratch holds nothing of a call before.
Bytes result_of(const Case& one, const Schedule& schedule) {
  Bytes result;
  std::exception_ptr thrown;
  std::thread caller([&] {
    try {
      result = one.run(schedule, cases::pool_of(2));
    } catch (const std::bad_alloc&) {
      thrown = std::current_exception();
    }
  });
  caller.join();
  if (thrown) std::rethrow_exception(thrown);
  return result;
}

// Whether a fault is noticed in a case, where `right` comes out without: in a process of its own,
// so that nothing of the fault is left. A signal that ends the process is told in `verdict`.
bool is_noticed(const Fault& fault, const Case& one, const Schedule& schedule, const Bytes& right,
                std::string& verdict) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kSeconds);
    qkernels::cpu::fault_that_is_on = &fault;
    bool wrong = false;
    try {
      const Bytes result = result_of(one, schedule);
      wrong = result != right && !one.complaint(result, schedule).empty();
    } catch (const std::bad_alloc&) {
      wrong = true;
    }
    _exit(wrong);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) {
    std::perror("no process for a fault");
    std::exit(3);
  }
  if (WIFSIGNALED(status)) verdict = std::string("signal ") + strsignal(WTERMSIG(status));
  return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

}  // namespace

// Scratch, which is aligned: of NaN, in place of what was right for a call before.
void* operator new(size_t bytes, std::align_val_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<size_t>(alignment), bytes) != 0) throw std::bad_alloc();
  return std::memset(memory, 0xff, bytes);
}

void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

const Fault* qkernels::cpu::fault_that_is_on = nullptr;

Fault& qkernels::cpu::fault_called(const char* name) {
  const std::lock_guard<std::mutex> lock(faults().mutex);
  return faults().called[name];
}

int main(int count, char** arguments) {
  using qkernels::cpu::Isa;
  if (count < 2 || count > 3) return 3;
  const std::string name = arguments[1], prefix = count == 3 ? arguments[2] : "";
  for (int i = 0; i < qkernels::cpu::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != qkernels::cpu::name_of(isa) || cases::why_not_here(isa) == nullptr) continue;
    std::printf("%s\n", cases::why_not_here(isa));
    return 2;
  }

  std::map<std::string, std::string> verdicts;
  cases::Options options;
  options.isas = cases::runnable({name});
  options.most_products = kMostProducts;
  cases::make_all(options, [&](const std::function<Case()>& make) {
    const Case one = make();
    for (auto& [called, fault] : faults().called) {
      if (fault.met.exchange(false)) verdicts.emplace(called, "missed");
    }
    for (const auto& schedule : one.schedules) {
      const Bytes right = result_of(one, schedule);
      const std::string complaint = one.complaint(right, schedule);
      if (!complaint.empty()) {
        std::printf("%s: %s\n", name_of(one, schedule).c_str(), complaint.c_str());
        std::exit(1);
      }
      for (auto& [called, fault] : faults().called) {
        if (!fault.met.exchange(false)) continue;
        std::string& verdict = verdicts.emplace(called, "missed").first->second;
        if (verdict != "missed" || called.rfind(prefix, 0) != 0) continue;
        if (is_noticed(fault, one, schedule, right, verdict)) verdict = "noticed";
      }
    }
  });
  for (const auto& [called, verdict] : verdicts) {
    std::printf("%s: %s\n", called.c_str(), verdict.c_str());
  }
  return 0;
}
