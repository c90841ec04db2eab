// How kernels are started: one function, with one body on a GPU and one in the emulator.

#pragma once

#include "cuda/ptx.cuh"

#if defined(QKERNELS_EMULATOR)
#include "emulator/launch.h"
#else

#include <mutex>
#include <set>
#include <utility>

namespace qkernels {

using Stream = cudaStream_t;

// Lets `kernel` have as much dynamic shared memory as a block of the current device can, once for
// each device. What a launch needs depends on the call, and the limit is the kernel's: set to one
// call's need, it may be too low for another that another thread starts meanwhile.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static auto& allowed = *new std::set<std::pair<const void*, int> >;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes));
  if (error == cudaSuccess) allowed.emplace(kernel, device);
  return error;
}

// Starts `kernel` on `stream` with `shared_bytes` of dynamic shared memory. Returns null, or what
// went wrong in words.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                   Stream stream, Arguments arguments) {
  constexpr int kBytesWithoutAsking = 48 * 1024;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kBytesWithoutAsking) error = allow_shared_memory(function);
  if (error == cudaSuccess) {
    void* pointers[] = {&arguments};
    error = cudaLaunchKernel(function, grid, dim3(threads), pointers,
                             static_cast<size_t>(shared_bytes), stream);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // the next launch must not find it
    return cudaGetErrorString(error);
  }
  const cudaError_t pending = cudaGetLastError();
  return pending == cudaSuccess ? nullptr : cudaGetErrorString(pending);
}

}  // namespace qkernels

#endif
