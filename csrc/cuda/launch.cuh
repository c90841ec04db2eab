// How kernels are started: two functions, with one body on a GPU and one in the emulator.

#pragma once

#include "cuda/ptx.cuh"

#if defined(QKERNELS_EMULATOR)
#include "emulator/launch.h"
#else

#include <map>
#include <mutex>
#include <utility>

namespace qkernels {

using Stream = cudaStream_t;

// What is known of a kernel on the current device.
struct KernelFacts {
  bool starts_early = false;  // it was compiled for sm_90 or later, and so waits where it must
};

// Found once for each kernel and device, and then the kernel may have as much dynamic shared memory
// as a block can. What a launch needs depends on the call, and the limit is the kernel's: set to
// one call's need, it may be too low for another that another thread starts meanwhile.
inline cudaError_t prepare(const void* kernel, KernelFacts* facts) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<const void*, int>, KernelFacts>;
  constexpr int kFirstEarly = 90;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({kernel, device});
  if (at != known.end()) {
    *facts = at->second;
    return cudaSuccess;
  }
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most - static_cast<int>(attributes.sharedSizeBytes));
  if (error != cudaSuccess) return error;
  facts->starts_early = attributes.ptxVersion >= kFirstEarly;
  known.emplace(std::make_pair(kernel, device), *facts);
  return cudaSuccess;
}

template <class Arguments>
const char* start_kernel(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                         Stream stream, Arguments arguments, bool early) {
  const void* function = reinterpret_cast<const void*>(kernel);
  KernelFacts facts;
  cudaError_t error = prepare(function, &facts);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early && facts.starts_early ? 1 : 0;
    void* pointers[] = {&arguments};
    error = cudaLaunchKernelExC(&config, function, pointers);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // the next launch must not find it
    return cudaGetErrorString(error);
  }
  const cudaError_t pending = cudaGetLastError();
  return pending == cudaSuccess ? nullptr : cudaGetErrorString(pending);
}

// Starts `kernel` on `stream` with `shared_bytes` of dynamic shared memory. Returns null, or what
// went wrong in words.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                   Stream stream, Arguments arguments) {
  return start_kernel(kernel, grid, threads, shared_bytes, stream, arguments, false);
}

// The same, before the kernel that is before it on the stream has ended, if that lets it
// (ptx::start_next_kernel): for kernels that call ptx::wait_for_kernels_before. Source: the CUDA
// programming guide, "Programmatic Dependent Launch".
template <class Arguments>
const char* launch_early(void (*kernel)(Arguments), dim3 grid, int threads, int shared_bytes,
                         Stream stream, Arguments arguments) {
  return start_kernel(kernel, grid, threads, shared_bytes, stream, arguments, true);
}

}  // namespace qkernels

#endif
