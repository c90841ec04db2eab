// launch() with a CUDA that is made up, for test_launch.py: kernels that need more shared memory
// than they are allowed fail, as on a GPU. Says what is wrong, or nothing.

#include "cuda/launch.cuh"

#include <cstdio>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kKilobyte = 1024;
constexpr int kStatic = 3 * kKilobyte;  // of each kernel
constexpr int kOptin[] = {99 * kKilobyte, 227 * kKilobyte};
constexpr int kPtxVersions[] = {80, 90};  // that the devices take of the kernels

thread_local int current = 0;
thread_local cudaError_t last_error = cudaSuccess;
std::mutex mutex;
std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device
int times_set = 0;
bool setting_fails = false;
int problems = 0;
thread_local bool started_early = false;

cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void expect(bool condition, const char* what) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (condition) return;
  ++problems;
  std::fprintf(stderr, "%s\n", what);
}

struct Arguments {
  int number;
};

void first_kernel(Arguments) {}
void second_kernel(Arguments) {}

bool starts(void (*kernel)(Arguments), int shared_bytes) {
  return qkernels::launch(kernel, dim3(3), 32, shared_bytes, nullptr, Arguments{1}) == nullptr;
}

bool starts_early(void (*kernel)(Arguments)) {
  const char* error =
      qkernels::launch_early(kernel, dim3(3), 32, 50 * kKilobyte, nullptr, Arguments{1});
  expect(error == nullptr, "an early launch failed");
  return started_early;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = kOptin[device];
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = kStatic;
  attributes->ptxVersion = kPtxVersions[current];
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++times_set;
  if (setting_fails || value + kStatic > kOptin[current]) return remembered(cudaErrorInvalidValue);
  allowed[{kernel, current}] = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  expect(static_cast<Arguments*>(arguments[0])->number == 1, "the kernel has other arguments");
  expect(config->gridDim.x == 3 && config->blockDim.x == 32, "the launch has other blocks");
  started_early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    started_early =
        started_early || (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                          attribute.val.programmaticStreamSerializationAllowed == 1);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = allowed.find({kernel, current});
  const int most = at == allowed.end() ? 48 * kKilobyte : at->second;
  const bool fits = static_cast<int>(config->dynamicSmemBytes) <= most;
  return remembered(fits ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

int main() {
  setting_fails = true;
  expect(!starts(first_kernel, 60 * kKilobyte), "a limit that is not set is no error");
  expect(cudaGetLastError() == cudaSuccess, "an error is left for the next launch");
  setting_fails = false;
  times_set = 0;

  // Each thread's launches need less and more by turns.
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      current = t % 2;
      for (int i = 0; i < 500; ++i) {
        const int bytes = (i + t) % 3 == 0 ? 50 * kKilobyte : kOptin[current] - kStatic;
        expect(starts(i % 2 == 0 ? first_kernel : second_kernel, bytes), "a launch failed");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(times_set == 4, "the limit is not set once for each kernel and device");

  for (current = 0; current < 2; ++current) {
    expect(starts_early(first_kernel) == (kPtxVersions[current] >= 90),
           "code for sm_80 does not wait, and starts early");
    expect(starts(first_kernel, 0) && !started_early, "an ordinary launch starts early");
  }
  current = 0;
  expect(!starts(first_kernel, kOptin[0]), "more than there is can be had");
  expect(starts(first_kernel, 60 * kKilobyte), "an error is left for the next launch");
  return problems == 0 ? 0 : 1;
}
