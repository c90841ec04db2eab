// The last choice, for test_bindings.py: says what is wrong, or nothing.

#include "bindings/cuda/last_choice.h"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace qkernels::bindings {
namespace {

#define EXPECT(condition)                                                                 \
  do {                                                                                    \
    if (!(condition)) throw std::logic_error(std::to_string(__LINE__) + ": " #condition); \
  } while (false)

using Key = std::pair<int, int>;

struct World {
  LastChoice<Key, int> last;
  std::atomic<int> chosen{0};

  int get(int a, int b) {
    return last.get({a, b}, [&] {
      ++chosen;
      return 100 * a + b;
    });
  }
};

void the_same_is_chosen_once() {
  World w;
  for (int i = 0; i < 3; ++i) EXPECT(w.get(1, 2) == 102 && w.chosen == 1);
}

void another_is_chosen_anew() {
  World w;
  for (int i = 0; i < 3; ++i)
    EXPECT(w.get(1, 2) == 102 && w.get(2, 1) == 201 && w.get(1, 1) == 101);
  EXPECT(w.chosen == 9);
}

void a_failure_is_no_choice() {
  World w;
  w.get(1, 2);
  bool failed = false;
  try {
    w.last.get({3, 4}, []() -> int { throw std::runtime_error("none"); });
  } catch (const std::runtime_error&) {
    failed = true;
  }
  EXPECT(failed && w.get(1, 2) == 102 && w.chosen == 1 && w.get(3, 4) == 304);
}

void many_threads() {
  World w;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < 2000; ++i) {
        const int a = i / 50 % 2, b = thread % 2;
        if (w.get(a, b) != 100 * a + b) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
}

}  // namespace
}  // namespace qkernels::bindings

int main() {
  using namespace qkernels::bindings;
  try {
    the_same_is_chosen_once();
    another_is_chosen_anew();
    a_failure_is_no_choice();
    many_threads();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
