// A stack and the point where it was left: what a thread of a block runs on.

#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qkernels::emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of the stack: its lowest address
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

// Gives `fiber` a stack of its own, for good, on which the first switch to it calls `entry`. That
// must call entered_fiber() first, and never returns.
void make_fiber(Fiber& fiber, void (*entry)());
void entered_fiber();

// Leaves `from`, which is running, for `to`; returns when something switches to `from`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace qkernels::emulator
