// What the bindings of the CUDA kernels need of a device, on a GPU and in the emulator.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cuda/launch.cuh"

#if !defined(QKERNELS_EMULATOR)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace qkernels::bindings {

struct DeviceFacts {
  int multiprocessors;
  int shared_bytes;                 // that a block can have
  int multiprocessor_shared_bytes;  // and all blocks of a multiprocessor
};

// While it lives, the tensor's device is current.
class DeviceScope {
 public:
#if defined(QKERNELS_EMULATOR)
  explicit DeviceScope(const at::Tensor&) {}

  Stream stream() const { return nullptr; }
#else
  explicit DeviceScope(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}

  Stream stream() const { return stream_.stream(); }
#endif

  // The same object for a device at all times.
  const DeviceFacts& facts() const;

  // `count` counters or more for a kernel that starts on this stream, which finds zeros and leaves
  // zeros. They belong to the stream or, where one is captured, to its graph as long as that
  // exists; they lie outside of torch's memory, whose pools a graph may own. See counter_pool.h.
  uint32_t* counters(int64_t count) const;

#if !defined(QKERNELS_EMULATOR)

 private:
  int index() const { return guard_.current_device().index(); }

  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
#endif
};

}  // namespace qkernels::bindings
