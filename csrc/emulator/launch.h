// The emulator's body of launch.cuh.

#pragma once

#include "emulator/builtins.h"
#include "emulator/launches.h"

namespace qkernels {

using Stream = void*;

// Runs the kernel to its end. Returns null, or what went wrong in words, which the next launch
// overwrites.
template <class Arguments>
const char* run_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                       const Arguments& arguments, bool early, emulator::Place place) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  };
  const Call call{kernel, arguments};
  return emulator::run_grid(
      {grid.x, grid.y, grid.z}, threads, shared_bytes,
      [](const void* pointer) {
        const Call& call = *static_cast<const Call*>(pointer);
        call.kernel(call.arguments);
      },
      &call, early, place);
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes, Stream,
                   Arguments arguments QK_AND_SITE) {
  return run_kernel(kernel, grid, threads, shared_bytes, arguments, false, place);
}

template <class Arguments>
const char* launch_early(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                         Stream, Arguments arguments QK_AND_SITE) {
  return run_kernel(kernel, grid, threads, shared_bytes, arguments, true, place);
}

}  // namespace qkernels
