// How kernels are started: one function, with one body on a GPU and one in the emulator.

#pragma once

#include "cuda/ptx.cuh"

#if defined(QKERNELS_EMULATOR)
#include "emulator/launch.h"
#else

namespace qkernels {

using Stream = cudaStream_t;

// Starts `kernel` on `stream` with `shared_bytes` of dynamic shared memory. Returns null, or what
// went wrong in words.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                   Stream stream, Arguments arguments) {
  constexpr int kBytesWithoutAsking = 48 * 1024;
  if (shared_bytes > kBytesWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  void* pointers[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                                             dim3(threads), pointers, shared_bytes, stream);
  if (error != cudaSuccess) {
    cudaGetLastError();  // the next launch must not find it
    return cudaGetErrorString(error);
  }
  const cudaError_t pending = cudaGetLastError();
  return pending == cudaSuccess ? nullptr : cudaGetErrorString(pending);
}

}  // namespace qkernels

#endif
