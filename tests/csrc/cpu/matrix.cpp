// All cases, for sanitizers, which do not get along with Python. Each number is held to its truth;
// the same bytes are asked for whatever the number of threads, and beside other callers.
//
//     matrix [--every=N] [--break] [isa ...]
//
// --every=N runs each Nth case. --break takes the last element off every y, which a sanitizer must
// find. Without names, all instructions that this machine has are tried. Ends with 2 where it has
// none of them.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"

using cases::Bytes;
using cases::Case;
using cases::pool_of;
using qkernels::cpu::Schedule;

namespace {

struct Arguments {
  size_t every = 1;
  cases::Options options;
};

Arguments parsed(int count, char** arguments) {
  Arguments out;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--break")
      out.options.missing = 1;
    else if (argument.rfind("--every=", 0) == 0)
      out.every = static_cast<size_t>(std::atoll(argument.c_str() + 8));
    else
      names.push_back(argument);
  }
  out.options.isas = cases::runnable(names);
  return out;
}

// The results of a case, one for each schedule, by one thread; adds to `failures`, where other
// `threads` come to others too.
std::vector<Bytes> results_of(const Case& one, int threads, std::vector<std::string>& failures) {
  std::vector<Bytes> results;
  for (const Schedule& schedule : one.schedules) {
    results.push_back(one.run(schedule, pool_of(1)));
    const std::string complaint = one.complaint(results.back(), schedule);
    if (!complaint.empty()) failures.push_back(name_of(one, schedule) + ": " + complaint);
    if (one.run(schedule, pool_of(threads)) == results.back()) continue;
    failures.push_back(name_of(one, schedule) + ": the number of threads makes a difference");
  }
  return results;
}

}  // namespace

int main(int count, char** arguments) {
  const auto [every, options] = parsed(count, arguments);
  if (every < 1 || options.isas.empty()) {
    std::fprintf(stderr, "no instructions to try, or --every below 1\n");
    return 2;
  }
  std::vector<Case> some;
  size_t made = 0;
  cases::make_all(options, [&, every = every](const std::function<Case()>& make) {
    if (made++ % every == 0) some.push_back(make());
  });

  std::vector<std::string> failures;
  std::vector<std::vector<Bytes>> expected;
  for (const Case& one : some) {
    const int threads = expected.size() % 2 == 0 ? 2 : 3;
    expected.push_back(results_of(one, threads, failures));
  }

  // All of it again beside other callers, as in a server: each thread has scratch of its own.
  constexpr size_t kCallers = 4;
  std::vector<std::string> found[kCallers];
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (size_t i = caller; i < some.size(); i += kCallers) {
        for (size_t s = 0; s < some[i].schedules.size(); ++s) {
          const Schedule& schedule = some[i].schedules[s];
          if (some[i].run(schedule, pool_of(2)) == expected[i][s]) continue;
          found[caller].push_back(name_of(some[i], schedule) +
                                  ": another result beside other callers");
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& wrong : found) failures.insert(failures.end(), wrong.begin(), wrong.end());

  for (const std::string& failure : failures) std::printf("%s\n", failure.c_str());
  std::printf("%zu cases, %zu failures, up to %s\n", some.size(), failures.size(),
              qkernels::cpu::name_of(options.isas.back()));
  return failures.empty() ? 0 : 1;
}
