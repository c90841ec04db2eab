// Deliberate faults. tests/csrc/test_cpu_mutations.py turns on one at a time, and the tests of
// these kernels must notice it.
//
// QK_FAULT(name) is true where that test asks for the fault. In every other build it is false, and
// the compiler leaves out what depends on it. A name stands in one place alone; those of faults on
// AMX tiles begin with tile_, and those in what is for 64-bit Arm alone with neon_.

#pragma once

#ifdef QKERNELS_FAULTS
namespace qkernels::cpu {

// Defined by the test.
bool fault_is_on(const char* name);

}  // namespace qkernels::cpu

#define QK_FAULT(name)                                             \
  ([] {                                                            \
    static const bool is_on = ::qkernels::cpu::fault_is_on(#name); \
    return is_on;                                                  \
  }())
#else
#define QK_FAULT(name) false
#endif
