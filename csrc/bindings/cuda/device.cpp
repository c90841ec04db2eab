#include "bindings/cuda/device.h"

#include <map>
#include <mutex>

#include "bindings/cuda/counter_pool.h"

#if !defined(QKERNELS_EMULATOR)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace qkernels::bindings {

#if defined(QKERNELS_EMULATOR)

namespace {

// Memory of the process. Nothing is captured.
class EmulatedCounters final : public CounterDevice<std::nullptr_t> {
 public:
  uint32_t* allocate(int, int64_t count) override { return new uint32_t[count](); }

  void when_gone(std::nullptr_t, void (*)(void*), void*) override {
    TORCH_INTERNAL_ASSERT(false, "the emulator captures no graphs");
  }
};

}  // namespace

// Few processors, so that small problems are split in as many ways as large ones on a GPU.
const DeviceFacts& DeviceScope::facts() const {
  static const DeviceFacts emulated = {4, 227 * 1024, 228 * 1024};
  return emulated;
}

uint32_t* DeviceScope::counters(int64_t count) const {
  static EmulatedCounters device;
  static CounterPool<std::nullptr_t> pool(device);
  return pool.counters({0, 0, 0}, nullptr, count);
}

#else

namespace {

// A call of CUDA that `what` describes went well, or throws with its error, which no later call
// finds then.
void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

// A stream that waits for no other.
class OwnStream {
 public:
  OwnStream() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
               "no stream to zero counters of blocks on");
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  ~OwnStream() { C10_CUDA_CHECK_WARN(cudaStreamDestroy(stream_)); }

  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_;
};

class CudaCounters final : public CounterDevice<cudaGraph_t> {
 public:
  // Of the current device.
  uint32_t* allocate(int device, int64_t count) override {
    const size_t bytes = static_cast<size_t>(count) * sizeof(uint32_t);
    // Neither allocating nor waiting is recorded by a capture, of this thread or another one; but
    // for this, they would end it.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    const OwnStream stream;
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error != cudaSuccess) cudaGetLastError();
    TORCH_CHECK(error == cudaSuccess, "CUDA device ", device, " has no ", bytes,
                " bytes for counters of blocks, which are not torch's: ", cudaGetErrorString(error),
                "; free some of its memory, as torch.cuda.empty_cache() does");
    cudaError_t zeroed = cudaMemsetAsync(memory, 0, bytes, stream.get());
    if (zeroed == cudaSuccess) zeroed = cudaStreamSynchronize(stream.get());
    if (zeroed != cudaSuccess) cudaFree(memory);
    check_cuda(zeroed, "counters of blocks cannot be zeroed");
    return static_cast<uint32_t*>(memory);
  }

  // CUDA keeps a graph's objects for what is instantiated from it, until the last launch has ended.
  void when_gone(cudaGraph_t graph, void (*released)(void*), void* data) override {
    cudaUserObject_t object;
    check_cuda(cudaUserObjectCreate(&object, data, released, 1, cudaUserObjectNoDestructorSync),
               "a captured graph cannot be given counters of blocks");
    const cudaError_t error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
    // The object stays, since its end would release what is still the caller's.
    check_cuda(error, "a captured graph does not take counters of blocks");
  }
};

}  // namespace

const DeviceFacts& DeviceScope::facts() const {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(index());
  if (at != known.end()) return at->second;
  DeviceFacts facts;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&facts.shared_bytes,
                                        cudaDevAttrMaxSharedMemoryPerBlockOptin, index()));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&facts.multiprocessor_shared_bytes,
                                        cudaDevAttrMaxSharedMemoryPerMultiprocessor, index()));
  return known.emplace(index(), facts).first->second;
}

uint32_t* DeviceScope::counters(int64_t count) const {
  // Never destroyed: graphs may end after everything else.
  static auto& device = *new CudaCounters;
  static auto& pool = *new CounterPool<cudaGraph_t>(device);
  unsigned long long number = 0, capture = 0;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamGetCaptureInfo(stream(), &status, &capture, &graph),
             "it is not known whether this stream is captured");
  // A handle may be another stream's later; a number is not.
  check_cuda(cudaStreamGetId(stream(), &number), "this stream has no number");
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  return pool.counters({index(), number, capture}, graph, count);
}

#endif

}  // namespace qkernels::bindings
