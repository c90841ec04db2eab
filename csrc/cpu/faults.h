// Deliberate faults. tests/csrc/test_cpu_mutations.py turns on one at a time, and the tests of
// these kernels must notice it.
//
// QK_FAULT(name) is true where that test asks for the fault. In every other build it is false, and
// the compiler leaves out what depends on it. A name stands in one place alone; those of faults on
// AMX tiles begin with tile_, and those in what is for 64-bit Arm alone with neon_.

#pragma once

#ifdef QKERNELS_FAULTS
#include <atomic>

namespace qkernels::cpu {

// A place with a fault. `met`: whether a kernel came by it.
struct Fault {
  std::atomic<bool> met;
};

// Both defined by the test.
Fault& fault_called(const char* name);
extern const Fault* fault_that_is_on;

inline bool passes(Fault& fault) {
  // Threads that only read do not take the line from each other.
  if (!fault.met.load(std::memory_order_relaxed)) fault.met.store(true, std::memory_order_relaxed);
  return &fault == fault_that_is_on;
}

}  // namespace qkernels::cpu

#define QK_FAULT(name)                                                           \
  ([] {                                                                          \
    static ::qkernels::cpu::Fault& fault = ::qkernels::cpu::fault_called(#name); \
    return ::qkernels::cpu::passes(fault);                                       \
  }())
#else
#define QK_FAULT(name) false
#endif
