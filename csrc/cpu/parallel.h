// Work for several threads. The threads belong to the caller, who says how to start them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>

#include "cpu/faults.h"

namespace qkernels::cpu {

struct Pool {
  int threads;  // at most so many work
  // Calls body(context) on `threads` threads, the caller among them, and waits for all.
  void (*run)(int threads, void (*body)(void*), void* context);
};

// body(task) for each task of [0, tasks), in any order. What a task computes must not depend on the
// thread; so the bits of a result do not depend on how many there are. What a task throws, such as
// std::bad_alloc, ends the work and is thrown here: no exception may leave another thread.
template <class Body>
void parallel_for(const Pool& pool, int64_t tasks, const Body& body) {
  if (QK_FAULT(last_task_missing)) --tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> has_thrown{false};
  std::exception_ptr thrown;
  auto work = [&] {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        if (QK_FAULT(no_memory_in_a_thread)) throw std::bad_alloc();
        body(task);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      if (!has_thrown.exchange(true)) thrown = std::current_exception();
    }
  };
  const int threads = static_cast<int>(std::min<int64_t>(pool.threads, tasks));
  if (threads <= 1)
    work();
  else
    pool.run(threads, [](void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace qkernels::cpu
