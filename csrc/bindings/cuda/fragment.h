// Weights in the fragment layout: tensors, checked, as the CUDA kernels read them.

#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "bindings/checks.h"
#include "cuda/weight_only/weight_only.h"

// Compiled twice: for a GPU, as torch.ops.qkernels_cuda, and with the emulator, as
// torch.ops.qkernels_emulated, whose tensors are on the CPU.
#if defined(QKERNELS_EMULATOR)
#define QKERNELS_LIBRARY qkernels_emulated
#define QKERNELS_DISPATCH_KEY CPU
#else
#define QKERNELS_LIBRARY qkernels_cuda
#define QKERNELS_DISPATCH_KEY CUDA
#endif

namespace qkernels::bindings {

// What a weight is, but for its tensors.
struct FragmentShape {
  int64_t n, k;
  int64_t group_size;  // at most k
  WeightCode code;
};

// Throws ValueError for a weight that is larger than the kernels take, or empty.
void check_size(int64_t n, int64_t k);

// Throws ValueError for what the kernels do not take.
FragmentShape fragment_shape(int64_t n, int64_t k, int64_t group_size, std::string_view code);

// zeros and table are null where the weight has none.
FragmentWeight fragment_weight(const FragmentShape& shape, const at::Tensor& words,
                               const at::Tensor& scales, const at::Tensor* zeros,
                               const at::Tensor* table);

void check_words(const at::Tensor& words, int64_t n, int64_t k, int bits);

FloatType float_type(const char* name, const at::Tensor& tensor);

// Null where there is none.
inline const at::Tensor* pointer(const Optional& tensor) { return tensor ? &*tensor : nullptr; }

// Throws where a kernel says what went wrong.
inline void succeed(const char* problem) { TORCH_CHECK(problem == nullptr, problem); }

}  // namespace qkernels::bindings
