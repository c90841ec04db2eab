// torch.ops.qkernels.linear above its kernels: the gradient for x, and autocast.

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "bindings/checks.h"

namespace qkernels::bindings {

namespace {

using Linear = at::Tensor(const at::Tensor&, at::TensorList, const Optional&, std::string_view);
using GradInput = at::Tensor(const at::Tensor&, at::TensorList, std::string_view);

const c10::TypedOperatorHandle<Linear>& linear_operator() {
  static const auto found =
      c10::Dispatcher::singleton().findSchemaOrThrow("qkernels::linear", "").typed<Linear>();
  return found;
}

at::Tensor below_autograd(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList buffers,
                          const Optional& bias, std::string_view spec) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear_operator().redispatch(keys & c10::after_autograd_keyset, x, buffers, bias, spec);
}

// All but x, which alone has a gradient: arguments that autograd does not look into.
struct Constants {
  c10::DispatchKeySet keys;
  at::TensorList buffers;
  const Optional& bias;
  std::string_view spec;
};

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  // Nothing but what is saved is read by `backward`.
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const Constants& constants) {
    // One by one: compiled autograd does not look into lists. Not as variables, which inference
    // tensors cannot be.
    auto& saved = context->saved_data;
    for (const at::Tensor& buffer : constants.buffers) {
      const std::string number = std::to_string(saved.size());
      saved[number] = buffer;
    }
    saved["spec"] = std::string(constants.spec);
    return below_autograd(constants.keys, x, constants.buffers, constants.bias, constants.spec);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto grad_input = c10::Dispatcher::singleton()
                                       .findSchemaOrThrow("qkernels::linear_grad_input", "")
                                       .typed<GradInput>();
    auto& saved = context->saved_data;
    std::vector<at::Tensor> buffers;
    while (buffers.size() + 1 < saved.size()) {
      buffers.push_back(saved[std::to_string(buffers.size())].toTensor());
    }
    return {grad_input.call(grads[0], buffers, saved["spec"].toStringView()), {}};
  }
};

at::Tensor linear_autograd(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList buffers,
                           const Optional& bias, std::string_view spec) {
  if (x.requires_grad() && at::GradMode::is_enabled()) {
    return LinearFunction::apply(x, Constants{keys, buffers, bias, spec});
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(x),
                              "qkernels::linear has no forward-mode gradient: use backward");
  return below_autograd(keys, x, buffers, bias, spec);
}

at::Tensor linear_autocast(const at::Tensor& x, at::TensorList buffers, const Optional& bias,
                           std::string_view spec) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const at::ScalarType type = at::autocast::get_autocast_dtype(x.device().type());
  return linear_operator().call(x.is_floating_point() ? x.to(type) : x, buffers, bias, spec);
}

}  // namespace

TORCH_LIBRARY_IMPL(qkernels, Autograd, m) { m.impl("linear", TORCH_FN(linear_autograd)); }

TORCH_LIBRARY_IMPL(qkernels, AutocastCPU, m) { m.impl("linear", TORCH_FN(linear_autocast)); }

TORCH_LIBRARY_IMPL(qkernels, AutocastCUDA, m) { m.impl("linear", TORCH_FN(linear_autocast)); }

}  // namespace qkernels::bindings
