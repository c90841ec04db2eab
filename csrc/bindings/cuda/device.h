// What the bindings of the CUDA kernels need of a device, on a GPU and in the emulator.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/launch.cuh"

#if !defined(QKERNELS_EMULATOR)
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace qkernels::bindings {

struct DeviceFacts {
  int multiprocessors;
  int shared_bytes;  // that a block can have
};

// While it lives, the tensor's device is current.
class DeviceScope {
 public:
#if defined(QKERNELS_EMULATOR)
  explicit DeviceScope(const at::Tensor&) {}

  Stream stream() const { return nullptr; }

  bool capturing() const { return false; }

  // Few processors, so that small problems are split in as many ways as large ones on a GPU.
  DeviceFacts facts() const { return {4, 227 * 1024}; }

 private:
  int index() const { return 0; }
#else
  explicit DeviceScope(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}

  Stream stream() const { return stream_.stream(); }

  bool capturing() const {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }

  const DeviceFacts& facts() const {
    static std::mutex mutex;
    static std::map<int, DeviceFacts> known;
    const std::lock_guard<std::mutex> lock(mutex);
    auto [at, is_new] = known.try_emplace(index());
    if (is_new) {
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&at->second.multiprocessors,
                                            cudaDevAttrMultiProcessorCount, index()));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&at->second.shared_bytes,
                                            cudaDevAttrMaxSharedMemoryPerBlockOptin, index()));
    }
    return at->second;
  }

 private:
  int index() const { return guard_.current_device().index(); }

  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
#endif

 public:
  struct Scratch {
    at::Tensor partials, counters;
  };

  // Scratch of this stream, which keeps its address from call to call, as CUDA graphs want it. The
  // counters are zero. While a graph is captured on a stream that has none yet, the graph gets
  // scratch of its own, which it zeroes itself.
  Scratch scratch(const at::Tensor& like, int64_t partial_bytes, int64_t counter_bytes) const {
    static std::mutex mutex;
    // Never destroyed: when a process ends, CUDA may be gone before its tensors.
    static auto& kept = *new std::map<std::pair<int, Stream>, std::vector<Scratch>>;
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<Scratch>& all = kept[{index(), stream()}];
    int64_t least_partials = int64_t{32} << 20, least_counters = int64_t{64} << 10;
    if (!all.empty()) {
      least_partials = static_cast<int64_t>(all.back().partials.nbytes());
      least_counters = static_cast<int64_t>(all.back().counters.nbytes());
      if (least_partials >= partial_bytes && least_counters >= counter_bytes) return all.back();
    }
    const auto options = like.options();
    const Scratch made = {
        at::empty({std::max(partial_bytes, least_partials) / 4}, options.dtype(at::kFloat)),
        at::zeros({std::max(counter_bytes, least_counters) / 4}, options.dtype(at::kInt))};
    // Smaller ones stay: a graph may have been captured with them.
    if (!capturing()) all.push_back(made);
    return made;
  }
};

}  // namespace qkernels::bindings
