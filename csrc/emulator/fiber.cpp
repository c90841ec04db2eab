#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace qkernels::emulator {
namespace {

// Room for the frames of a kernel under AddressSanitizer; pages that are not touched cost nothing.
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;

// The stacks' hot ends must not all fall on the same sets of the caches.
size_t next_skew() {
  static size_t fibers = 0;
  return fibers++ % 61 * 320;
}

Fiber* leaving = nullptr;

}  // namespace

#if defined(__x86_64__)

// Saves what the calling convention asks a function to keep. glibc's swapcontext makes two system
// calls besides, for the signal mask.
extern "C" void qkernels_emulator_switch_stack(void** save, void* stack_pointer);
asm(R"(
.text
.type qkernels_emulator_switch_stack, @function
qkernels_emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size qkernels_emulator_switch_stack, .-qkernels_emulator_switch_stack
)");

#endif

void make_fiber(Fiber& fiber, void (*entry)()) {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  char* bottom = static_cast<char*>(memory) + kGuardBytes;
  fiber.bottom = bottom;
  fiber.bytes = kStackBytes - next_skew();
#if defined(__x86_64__)
  // As if `entry` had been called: a return address, 8 bytes below a multiple of 16.
  void** top = reinterpret_cast<void**>(bottom + fiber.bytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = bottom;
  fiber.context.uc_stack.ss_size = fiber.bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void entered_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  // The bounds of a stack that this file did not make, the launching thread's, are known only now.
  __sanitizer_finish_switch_fiber(nullptr, &leaving->bottom, &leaving->bytes);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
  leaving = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#if defined(__x86_64__)
  qkernels_emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, &leaving->bottom, &leaving->bytes);
#endif
}

}  // namespace qkernels::emulator
