#include "bindings/operator.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <limits>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "bindings/preparation.h"
#include "integers.h"

namespace qkernels::bindings {

namespace {

// What a list of buffers is, from its spec: "scheme|layout|n|k|name,name,...|backend|invariant".
struct Description {
  explicit Description(std::string_view text) : spec(text) {
    std::string_view rest = spec;
    const auto next = [&rest](char separator) {
      const size_t length = std::min(rest.find(separator), rest.size());
      const std::string_view part = rest.substr(0, length);
      rest.remove_prefix(std::min(length + 1, rest.size()));
      return part;
    };
    for (int skipped = 0; skipped < 2; ++skipped) next('|');
    for (int64_t* size : {&n, &k}) {
      const std::string_view digits = next('|');
      std::from_chars(digits.data(), digits.data() + digits.size(), *size);
    }
    rest = next('|');
    while (!rest.empty()) fields.push_back(field_of(next(',')));
    TORCH_INTERNAL_ASSERT(n > 0 && k > 0 && !fields.empty() && fields[0] == &Buffers::words, spec);
  }

  // Whether a call is what the spec says, as far as that can change from call to call.
  bool fits(const at::Tensor& x, at::TensorList buffers) const {
    return x.dim() > 0 && x.size(-1) == k && buffers.size() == fields.size() &&
           x.device() == buffers[0].device();
  }

  // Null stands for those that only Python knows.
  bool has(Field field) const {
    return std::find(fields.begin(), fields.end(), field) != fields.end();
  }

  Buffers named(at::TensorList buffers) const {
    Buffers named;
    for (size_t i = 0; i < fields.size(); ++i) {
      if (fields[i] != nullptr) named.*fields[i] = &buffers[i];
    }
    return named;
  }

  const std::string spec;
  int64_t n = 0, k = 0;
  std::vector<Field> fields;
};

struct Known {
  at::Device device;
  at::ScalarType y_type;
  Answer answer;
};

struct Weight {
  explicit Weight(std::string_view spec) : description(spec) {}

  const Known* find(const at::Tensor& x, at::ScalarType y_type) const {
    const int64_t m = x.numel() / description.k;
    for (const Known& each : known) {
      if (each.y_type == y_type && each.device == x.device() && each.answer.least_rows <= m &&
          m <= each.answer.most_rows) {
        return &each;
      }
    }
    return nullptr;
  }

  const Description description;
  std::vector<Known> known;  // by the table's lock
};

struct Found {
  const Description* description = nullptr;
  std::shared_ptr<Route> route;
};

// Python's lock is never waited for while the table's is held: routes may hold Python objects, so
// none is destroyed there.
class Table {
 public:
  // What is known for a call; no route where nothing is, and no description for a new spec.
  Found find(const at::Tensor& x, std::string_view spec, at::ScalarType y_type) const {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto at = weights_.find(spec);
    if (at == weights_.end()) return {};
    const Weight& weight = *at->second;
    const Known* known = weight.find(x, y_type);
    return {&weight.description, known == nullptr ? nullptr : known->answer.route};
  }

  const Description& add(const Question& question, const Answer& answer, uint64_t generation) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    auto at = weights_.find(question.spec);
    if (at == weights_.end()) {
      auto made = std::make_unique<Weight>(question.spec);
      const std::string_view key = made->description.spec;
      at = weights_.emplace(key, std::move(made)).first;
    }
    Weight& weight = *at->second;
    // Another thread may have asked the same meanwhile.
    const bool is_new = weight.find(question.x, question.y_type) == nullptr;
    if (is_new && generation == generation_) {
      weight.known.push_back({question.x.device(), question.y_type, answer});
    }
    return weight.description;
  }

  // An answer to a question of an earlier generation is used once and forgotten.
  uint64_t generation() const { return generation_; }

  void forget() {
    std::vector<std::vector<Known>> forgotten;
    {
      const std::unique_lock<std::shared_mutex> lock(mutex_);
      ++generation_;
      for (auto& [spec, weight] : weights_) {
        forgotten.push_back(std::move(weight->known));
        weight->known.clear();
      }
    }
  }

 private:
  mutable std::shared_mutex mutex_;
  std::atomic<uint64_t> generation_{0};
  // Descriptions stay: calls that run point to them.
  std::unordered_map<std::string_view, std::unique_ptr<Weight>> weights_;
};

// Never destroyed: routes may hold Python objects, and Python may be gone by then.
Table& table() {
  static auto* held = new Table;
  return *held;
}

std::atomic<Answer (*)(const Question&)> asked{nullptr};

Found ask(const Question& question) {
  const uint64_t generation = table().generation();
  const Answer answer = asked.load()(question);
  const Description& description = table().add(question, answer, generation);
  TORCH_INTERNAL_ASSERT(description.fits(question.x, question.buffers), question.spec);
  TORCH_INTERNAL_ASSERT(answer.route->reads_any_field() || !description.has(nullptr),
                        question.spec);
  return {&description, answer.route};
}

at::Tensor run(const Found& found, const Question& question, const Optional& bias,
               const Reader* reader = nullptr, const at::Tensor* y = nullptr) {
  const Buffers buffers = found.description->named(question.buffers);
  return found.route->run({question.x, question.row_scales, buffers, question.buffers, bias,
                           question.y_type, reader, y});
}

// The route for x in floats.
Found found_for(const Question& question) {
  const Found found = table().find(question.x, question.spec, question.y_type);
  if (found.route && found.description->fits(question.x, question.buffers)) return found;
  return ask(question);
}

at::Tensor linear(const at::Tensor& x, at::TensorList buffers, const Optional& bias,
                  std::string_view spec) {
  const Question question{x, nullptr, buffers, spec, x.scalar_type()};
  return run(found_for(question), question, bias);
}

// --- A weight for each expert

std::vector<at::Tensor> buffers_of(at::TensorList stacks, int64_t expert) {
  std::vector<at::Tensor> buffers;
  buffers.reserve(stacks.size());
  for (const at::Tensor& stack : stacks) buffers.push_back(stack.select(0, expert));
  return buffers;
}

void check_grouped(const at::Tensor& x, const at::Tensor& ends, at::TensorList stacks) {
  require(x.dim() == 2, "x must have shape [M, K], got ", x.sizes());
  require(ends.dim() == 1 && ends.size(0) > 0 && ends.scalar_type() == at::kInt,
          "ends must be int32 [E], with a number for each expert, got ", ends.scalar_type(), " ",
          ends.sizes());
  require(ends.device() == x.device(), "ends is on ", ends.device(), " and x on ", x.device(),
          ": move one of them");
  for (const at::Tensor& stack : stacks) {
    require(stack.dim() > 0 && stack.size(0) == ends.size(0), "ends has ", ends.size(0),
            " experts, and each buffer must have as many, got ", stack.sizes());
  }
}

// On the host. Those on a GPU are waited for.
at::Tensor checked_ends(const at::Tensor& ends, int64_t m) {
  const at::Tensor held = ends.to(at::kCPU).contiguous();
  const int32_t* values = held.const_data_ptr<int32_t>();
  for (int64_t e = 0, before = 0; e < held.size(0); before = values[e++]) {
    require(before <= values[e] && values[e] <= m, "ends must not decrease, and be ", m,
            " at most, the rows of x; that of expert ", e, " is ", values[e], " behind ", before);
  }
  return held;
}

at::Tensor linear_grouped(const at::Tensor& x, const at::Tensor& ends, at::TensorList stacks,
                          std::string_view spec) {
  check_grouped(x, ends, stacks);
  const int64_t m = x.size(0), experts = ends.size(0);
  const at::ScalarType type = x.scalar_type();
  // Where ends are on a GPU, no number of rows is known here but the mean.
  const std::vector<at::Tensor> first = buffers_of(stacks, 0);
  const at::Tensor mean = x.narrow(0, 0, ceil_div(m, experts));
  const Found common = found_for({mean, nullptr, first, spec, type});
  const Buffers named = common.description->named(stacks);
  if (common.route->takes_groups(named)) {
    return common.route->run_grouped({x, ends, named, stacks});
  }
  const at::Tensor held = checked_ends(ends, m);
  const int32_t* values = held.const_data_ptr<int32_t>();
  at::Tensor y = empty_output(x, common.description->n, type);
  for (int64_t e = 0, start = 0; e < experts; start = values[e++]) {
    if (start == values[e]) continue;
    // Each expert's kernel is that for its own rows, as in a layer of its own.
    const std::vector<at::Tensor> buffers = buffers_of(stacks, e);
    const at::Tensor rows = x.narrow(0, start, values[e] - start);
    const Question question{rows, nullptr, buffers, spec, type};
    const Found found = found_for(question);
    const at::Tensor part = y.narrow(0, start, values[e] - start);
    if (found.route->fills_y()) {
      run(found, question, std::nullopt, nullptr, &part);
    } else {
      part.copy_(run(found, question, std::nullopt));
    }
  }
  const int64_t last = values[experts - 1];
  y.narrow(0, last, m - last).zero_();
  return y;
}

// --- x that is quantized

bool are_row_scales(const at::Tensor& scale, const at::Tensor& x) {
  return scale.scalar_type() == at::kFloat && scale.device() == x.device() &&
         scale.dim() == x.dim() && scale.size(-1) == 1 &&
         scale.sizes().slice(0, scale.dim() - 1) == x.sizes().slice(0, x.dim() - 1);
}

// The route for int8 rows of x.
Found found_for_quantized(const Question& question) {
  const at::Tensor& x = question.x;
  const Found found = table().find(x, question.spec, question.y_type);
  const bool fits = found.route && found.route->takes_quantized() &&
                    found.description->fits(x, question.buffers) && x.scalar_type() == at::kChar &&
                    are_row_scales(*question.row_scales, x) &&
                    !found.description->has(&Buffers::input_factor);
  return fits ? found : ask(question);
}

at::Tensor linear_quantized(const at::Tensor& x, const at::Tensor& scale, at::TensorList buffers,
                            const Optional& bias, std::string_view spec, at::ScalarType dtype) {
  const Question question{x, &scale, buffers, spec, dtype};
  return run(found_for_quantized(question), question, bias);
}

using Int8Rows = std::tuple<at::Tensor, at::Tensor>;  // int8 [..., N], fp32 [..., 1]

// The same operations as `reference.quantize_output`, and so the same bits.
Int8Rows quantize_output(at::Tensor y, const at::Tensor& scale, const Optional& zero, bool relu) {
  if (relu) y = y.relu();
  at::Tensor rounded = (y.to(at::kFloat) / scale).round_().nan_to_num_(0.0);
  if (zero) rounded += *zero;
  const at::Tensor finite = y.isfinite().all(-1, true);
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  return {rounded.clamp_(zero ? -128 : -127, 127).to(at::kChar),
          at::where(finite, scale, at::full_like(scale, kNan))};
}

void check_reader(const at::Tensor& scale, const Optional& zero, at::Device device) {
  require(scale.dim() == 0 && scale.scalar_type() == at::kFloat && scale.device() == device,
          "scale must be fp32 [] on ", device, ", got ", scale.scalar_type(), " ", scale.sizes(),
          " on ", scale.device());
  require(
      !zero || (zero->dim() == 0 && zero->scalar_type() == at::kInt && zero->device() == device),
      "zero must be int32 [] on ", device);
}

Int8Rows linear_to_int8(const at::Tensor& x, const Optional& x_scale, at::TensorList buffers,
                        const Optional& bias, std::string_view spec,
                        std::optional<at::ScalarType> dtype, const at::Tensor& scale,
                        const Optional& zero, bool relu) {
  require(x_scale.has_value() == dtype.has_value(),
          "x_scale and the dtype of y go together: both are of int8 x alone");
  check_reader(scale, zero, x.device());
  const Question question{x, x_scale ? &*x_scale : nullptr, buffers, spec,
                          dtype.value_or(x.scalar_type())};
  const Found found = x_scale ? found_for_quantized(question) : found_for(question);
  if (!found.route->gives_int8()) {
    return quantize_output(run(found, question, bias), scale, zero, relu);
  }
  const at::Tensor row_scales = empty_output(x, 1, at::kFloat);
  const Reader reader{scale, zero, relu, row_scales};
  return {run(found, question, bias, &reader), row_scales};
}

// --- Above the kernels: the gradient for x, and autocast

using Linear = at::Tensor(const at::Tensor&, at::TensorList, const Optional&, std::string_view);
using GradInput = at::Tensor(const at::Tensor&, at::TensorList, std::string_view);
using Grouped = at::Tensor(const at::Tensor&, const at::Tensor&, at::TensorList, std::string_view);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const c10::TypedOperatorHandle<Linear>& linear_operator() {
  static const auto found = find_operator<Linear>("qkernels::linear");
  return found;
}

const c10::TypedOperatorHandle<Grouped>& grouped_operator() {
  static const auto found = find_operator<Grouped>("qkernels::linear_grouped");
  return found;
}

at::Tensor below_autograd(c10::DispatchKeySet keys, const at::Tensor& x, at::TensorList buffers,
                          const Optional& bias, std::string_view spec) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return linear_operator().redispatch(keys & c10::after_autograd_keyset, x, buffers, bias, spec);
}

at::Tensor grouped_below_autograd(c10::DispatchKeySet keys, const at::Tensor& x,
                                  const at::Tensor& ends, at::TensorList stacks,
                                  std::string_view spec) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return grouped_operator().redispatch(keys & c10::after_autograd_keyset, x, ends, stacks, spec);
}

// One by one: compiled autograd does not look into lists. Not as variables, which inference tensors
// cannot be.
void save(torch::autograd::AutogradContext& context, at::TensorList tensors,
          std::string_view spec) {
  auto& saved = context.saved_data;
  for (size_t i = 0; i < tensors.size(); ++i) saved[std::to_string(i)] = tensors[i];
  saved["spec"] = std::string(spec);
}

std::vector<at::Tensor> saved_tensors(torch::autograd::AutogradContext& context) {
  auto& saved = context.saved_data;
  std::vector<at::Tensor> tensors;
  while (tensors.size() + 1 < saved.size()) {
    tensors.push_back(saved[std::to_string(tensors.size())].toTensor());
  }
  return tensors;
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
    save(*context, constants.buffers, constants.spec);
    return below_autograd(constants.keys, x, constants.buffers, constants.bias, constants.spec);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto grad_input = find_operator<GradInput>("qkernels::linear_grad_input");
    const std::string_view spec = context->saved_data["spec"].toStringView();
    return {grad_input.call(grads[0], saved_tensors(*context), spec), {}};
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

struct GroupedConstants {
  c10::DispatchKeySet keys;
  const at::Tensor& ends;
  at::TensorList stacks;
  std::string_view spec;
};

struct GroupedFunction : torch::autograd::Function<GroupedFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const GroupedConstants& constants) {
    std::vector<at::Tensor> tensors{constants.ends};
    tensors.insert(tensors.end(), constants.stacks.begin(), constants.stacks.end());
    save(*context, tensors, constants.spec);
    return grouped_below_autograd(constants.keys, x, constants.ends, constants.stacks,
                                  constants.spec);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads) {
    static const auto grad_input = find_operator<Grouped>("qkernels::linear_grouped_grad_input");
    const std::vector<at::Tensor> tensors = saved_tensors(*context);
    const std::string_view spec = context->saved_data["spec"].toStringView();
    return {grad_input.call(grads[0], tensors[0], at::TensorList(tensors).slice(1), spec), {}};
  }
};

at::Tensor grouped_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& ends,
                            at::TensorList stacks, std::string_view spec) {
  if (x.requires_grad() && at::GradMode::is_enabled()) {
    return GroupedFunction::apply(x, GroupedConstants{keys, ends, stacks, spec});
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(x),
      "qkernels::linear_grouped has no forward-mode gradient: use backward");
  return grouped_below_autograd(keys, x, ends, stacks, spec);
}

at::Tensor in_type_of_autocast(const at::Tensor& x) {
  const at::ScalarType type = at::autocast::get_autocast_dtype(x.device().type());
  return x.is_floating_point() ? x.to(type) : x;
}

at::Tensor linear_autocast(const at::Tensor& x, at::TensorList buffers, const Optional& bias,
                           std::string_view spec) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return linear_operator().call(in_type_of_autocast(x), buffers, bias, spec);
}

at::Tensor grouped_autocast(const at::Tensor& x, const at::Tensor& ends, at::TensorList stacks,
                            std::string_view spec) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  return grouped_operator().call(in_type_of_autocast(x), ends, stacks, spec);
}

}  // namespace

void answer_with(Answer (*answer)(const Question&)) { asked = answer; }

void forget_routes() { table().forget(); }

TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("linear", TORCH_FN(linear));
  m.impl("linear_grouped", TORCH_FN(linear_grouped));
  m.impl("linear_quantized", TORCH_FN(linear_quantized));
  m.impl("linear_to_int8", TORCH_FN(linear_to_int8));
}

TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("linear", TORCH_FN(linear));
  m.impl("linear_grouped", TORCH_FN(linear_grouped));
  m.impl("linear_quantized", TORCH_FN(linear_quantized));
  m.impl("linear_to_int8", TORCH_FN(linear_to_int8));
}

TORCH_LIBRARY_IMPL(qkernels, Autograd, m) {
  m.impl("linear", TORCH_FN(linear_autograd));
  m.impl("linear_grouped", TORCH_FN(grouped_autograd));
}

TORCH_LIBRARY_IMPL(qkernels, AutocastCPU, m) {
  m.impl("linear", TORCH_FN(linear_autocast));
  m.impl("linear_grouped", TORCH_FN(grouped_autocast));
}

TORCH_LIBRARY_IMPL(qkernels, AutocastCUDA, m) {
  m.impl("linear", TORCH_FN(linear_autocast));
  m.impl("linear_grouped", TORCH_FN(grouped_autocast));
}

}  // namespace qkernels::bindings
