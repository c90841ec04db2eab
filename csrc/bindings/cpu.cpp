#include "bindings/cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/peaks.h"
#include "cpu/vnni.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

std::atomic<bool> is_forked{false};

void run_on_torch_threads(int threads, void (*body)(void*), void* context) {
  // The runtime is the one that torch brings: setup.py links no other.
#pragma omp parallel num_threads(threads)
  body(context);
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  TORCH_CHECK_VALUE(condition, parts...);
}

cpu::Isa isa_of(std::string_view name) {
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    if (name == cpu::name_of(static_cast<cpu::Isa>(i))) return static_cast<cpu::Isa>(i);
  }
  TORCH_CHECK_VALUE(false, "isa must be portable, avx2, avx512 or amx, got ", name);
}

cpu::FloatType float_type(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kHalf: return cpu::FloatType::kFp16;
    case at::kBFloat16: return cpu::FloatType::kBf16;
    case at::kFloat: return cpu::FloatType::kFp32;
    default: TORCH_CHECK_VALUE(false, name, " must be fp16, bf16 or fp32, got ", type);
  }
}

cpu::GroupType group_type(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kHalf: return cpu::GroupType::kFp16;
    case at::kBFloat16: return cpu::GroupType::kBf16;
    case at::kFloat: return cpu::GroupType::kFp32;
    case at::kByte: return cpu::GroupType::kUint8;
    default: TORCH_CHECK_VALUE(false, name, " must be uint8, fp16, bf16 or fp32, got ", type);
  }
}

cpu::Code code_of(std::string_view name) {
  if (name == "int4") return cpu::Code::kInt4;
  if (name == "table4") return cpu::Code::kTable4;
  if (name == "int8") return cpu::Code::kInt8;
  if (name == "fp8e4m3") return cpu::Code::kFp8E4M3;
  if (name == "fp8e5m2") return cpu::Code::kFp8E5M2;
  TORCH_CHECK_VALUE(false, "code must be int4, table4, int8, fp8e4m3 or fp8e5m2, got ", name);
}

void check(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  require(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  require(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
  require(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
}

void check(const char* name, const at::Tensor& tensor, at::IntArrayRef shape, at::ScalarType type) {
  check(name, tensor, shape);
  require(tensor.scalar_type() == type, name, " must be ", type, ", got ", tensor.scalar_type());
}

using Optional = std::optional<at::Tensor>;

// Lets other Python threads run, where this one holds Python's lock at all.
class ReleasedLock {
 public:
  ReleasedLock() : state_(PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}
  ~ReleasedLock() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  ReleasedLock(const ReleasedLock&) = delete;
  ReleasedLock& operator=(const ReleasedLock&) = delete;

 private:
  PyThreadState* state_;
};

// Rows [m][k] that follow each other at any distance, their elements side by side.
void check_rows(const char* name, const at::Tensor& x, int64_t k) {
  require(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
  require(x.dim() == 2 && x.size(1) == k, name, " must have shape [M, ", k, "], got ", x.sizes());
  require(x.stride(1) == 1 || k <= 1, name, " must have adjacent columns, got strides ",
          x.strides());
}

// What a weight is, but for its tensors: made once, passed at each call.
class CpuLinear {
 public:
  CpuLinear(int64_t n, int64_t k, int64_t group, const std::string& code, double middle,
            const Optional& table, const Optional& nested_table, const std::string& isa, bool tiles,
            bool rounds_weights, const std::string& scale_of)
      : table_(table), nested_table_(nested_table) {
    weight_.n = n;
    weight_.k = k;
    weight_.group = std::min(group, k);
    weight_.code = code_of(code);
    weight_.middle = static_cast<float>(middle);
    require(n > 0 && k > 0, "n and k must be above 0, got ", n, " and ", k);
    require(group >= k || (group >= 16 && group % 16 == 0),
            "group must be a multiple of 16, or k or more, got ", group);
    weight_.prepare();
    require(table.has_value() == (weight_.code == cpu::Code::kTable4),
            "a table goes with table4 codes alone, got ", code);
    if (table) {
      check("table", *table, {16}, at::kFloat);
      weight_.table = table->const_data_ptr<float>();
    }
    if (nested_table) {
      check("nested_table", *nested_table, {256}, at::kFloat);
      weight_.nested_table = nested_table->const_data_ptr<float>();
    }
    schedule_ = {isa_of(isa), tiles, rounds_weights};
    const char* missing = cpu::why_not(schedule_.isa);
    require(missing == nullptr, isa, ": ", missing == nullptr ? "" : missing);
    require(!tiles || schedule_.isa == cpu::Isa::kAmx, "tiles need amx, got ", isa);
    require(tiles || !rounds_weights, "only tiles round weights");
    if (scale_of == "tensor")
      scale_of_ = cpu::ScaleOf::kTensor;
    else if (scale_of == "static")
      scale_of_ = cpu::ScaleOf::kGiven;
    else
      require(scale_of == "token", "scale_of must be token, tensor or static, got ", scale_of);
  }

  // y [M, N] for x [M, k] of fp16, bf16 or fp32, k <= the weight's.
  at::Tensor floats(const at::Tensor& x, const at::Tensor& words, const at::Tensor& scales,
                    const Optional& zeros, const Optional& channel_scales, const Optional& absmax,
                    const Optional& offset, const Optional& row_scales, const Optional& bias,
                    at::ScalarType y_type) const {
    const int64_t m = x.dim() == 2 ? x.size(0) : 0;
    require(!channel_scales, "two-level scales are for int8 products");
    cpu::FloatArguments arguments{};
    arguments.weight = weight(words, scales, zeros, channel_scales, absmax, offset);
    check_rows("x", x, weight_.k);
    const bool whole = !schedule_.tiles || schedule_.rounds_weights || weight_.groups() == 1;
    require(whole || cpu::fits_float_tiles(weight_.group),
            "tiles need groups of a multiple of 32, got ", weight_.group);
    arguments.m = m;
    arguments.k = weight_.k;
    arguments.x = x.const_data_ptr();
    arguments.x_type = float_type("x", x.scalar_type());
    arguments.x_stride = m > 1 ? x.stride(0) : weight_.k;
    require(
        !schedule_.rounds_weights || (x.scalar_type() == at::kBFloat16 && y_type == at::kBFloat16),
        "rounded weights go with x and y of bf16, got ", x.scalar_type(), " and ", y_type);
    at::Tensor y = at::empty({m, weight_.n}, y_type);
    arguments.out = output(y, bias);
    if (row_scales) {
      check("row_scales", *row_scales, {m}, at::kFloat);
      arguments.out.row_scales = row_scales->const_data_ptr<float>();
    }
    const ReleasedLock released;
    cpu::linear_float(arguments, schedule_, torch_pool());
    return y;
  }

  // The same with x quantized to int8 on the way; or int8 x with its row scales.
  at::Tensor integers(const at::Tensor& x, const at::Tensor& words, const at::Tensor& scales,
                      const Optional& zeros, const Optional& channel_scales,
                      const Optional& activation_scale, const Optional& row_scales,
                      const Optional& bias, at::ScalarType y_type) const {
    const int64_t m = x.dim() == 2 ? x.size(0) : 0;
    cpu::Int8Arguments arguments{};
    arguments.weight = weight(words, scales, zeros, channel_scales, std::nullopt, std::nullopt);
    const bool integers = !zeros || zeros->scalar_type() == at::kByte;
    require(integers, "zeros must be uint8 for int8 products, got ",
            zeros ? zeros->scalar_type() : at::kByte);
    require(weight_.code == cpu::Code::kInt4 || weight_.code == cpu::Code::kInt8,
            "int8 products take int4 and int8 codes alone");
    require(!channel_scales || weight_.code == cpu::Code::kInt4,
            "two-level scales are for codes of up to 4 bits");
    check_rows("x", x, weight_.k);
    const bool whole = arguments.weight.sums_are_integers();
    require(!schedule_.tiles || whole || cpu::fits_int8_tiles(weight_.group),
            "tiles need groups of a multiple of 64, got ", weight_.group);
    arguments.m = m;
    arguments.k = weight_.k;
    at::Tensor y = at::empty({m, weight_.n}, y_type);
    arguments.out = output(y, bias);
    const int64_t stride = m > 1 ? x.stride(0) : weight_.k;
    require(row_scales.has_value() == (x.scalar_type() == at::kChar),
            "row_scales go with int8 x alone, got x of ", x.scalar_type());
    if (row_scales) {
      check("row_scales", *row_scales, {m}, at::kFloat);
      arguments.out.row_scales = row_scales->const_data_ptr<float>();
      arguments.quantized = x.const_data_ptr<int8_t>();
      arguments.quantized_stride = stride;
    } else {
      arguments.source.x = x.const_data_ptr();
      arguments.source.type = float_type("x", x.scalar_type());
      arguments.source.k = weight_.k;
      arguments.source.x_stride = stride;
      arguments.scale_of = scale_of_;
      if (scale_of_ == cpu::ScaleOf::kGiven) {
        require(activation_scale.has_value(), "static activations need activation_scale");
        check("activation_scale", *activation_scale, {}, at::kFloat);
        arguments.given_scale = activation_scale->const_data_ptr<float>();
      }
    }
    const ReleasedLock released;
    cpu::linear_int8(arguments, schedule_, torch_pool());
    return y;
  }

 private:
  cpu::Weight weight(const at::Tensor& words, const at::Tensor& scales, const Optional& zeros,
                     const Optional& channel_scales, const Optional& absmax,
                     const Optional& offset) const {
    cpu::Weight weight = weight_;
    const int64_t panels = weight.panels(), groups = weight.groups();
    check("words", words, {panels, weight.columns() / weight.step_columns(), cpu::kLanes},
          at::kInt);
    check("scales", scales, {panels, groups, cpu::kLanes});
    weight.words = reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>());
    weight.scales = scales.const_data_ptr();
    weight.scale_type = group_type("scales", scales.scalar_type());
    if (zeros) {
      check("zeros", *zeros, {panels, groups, cpu::kLanes});
      weight.zeros = zeros->const_data_ptr();
      weight.zero_type = group_type("zeros", zeros->scalar_type());
    }
    if (channel_scales) {
      check("channel_scales", *channel_scales, {weight.n}, at::kFloat);
      weight.channel_scales = channel_scales->const_data_ptr<float>();
    }
    if (absmax) {
      require(offset.has_value() && nested_table_.has_value(), "nested scales need all parts");
      check("nested_absmax", *absmax, {ceil_div(weight.n * groups, 256)}, at::kFloat);
      check("nested_offset", *offset, {}, at::kFloat);
      weight.scale_type = cpu::GroupType::kNested;
      weight.nested_absmax = absmax->const_data_ptr<float>();
      weight.nested_offset = *offset->const_data_ptr<float>();
    }
    const bool integer_scales = weight.scale_type == cpu::GroupType::kUint8;
    require(integer_scales == channel_scales.has_value(),
            "uint8 scales need channel_scales or nested ones");
    return weight;
  }

  cpu::Output output(const at::Tensor& y, const Optional& bias) const {
    cpu::Output out{};
    out.y = y.mutable_data_ptr();
    out.y_type = float_type("y", y.scalar_type());
    if (bias) {
      check("bias", *bias, {weight_.n});
      out.bias = bias->const_data_ptr();
      out.bias_type = float_type("bias", bias->scalar_type());
    }
    return out;
  }

  cpu::Weight weight_{};
  cpu::Schedule schedule_{};
  cpu::ScaleOf scale_of_ = cpu::ScaleOf::kRow;
  Optional table_, nested_table_;  // keep alive what weight_ points to
};

// --- The operator qkernels::linear
//
// Which kernel runs is Python's to choose. Its choice is remembered here, since asking for it again
// takes longer than a small layer does.

struct Remembered {
  py::object owner;  // keeps `linear` alive
  const CpuLinear* linear;
  bool integers;
  int64_t n, k;
  // Where each tensor is in the list of buffers, or -1: words, scales, zeros, channel_scales,
  // nested_absmax, nested_offset, perm, activation_scale.
  std::vector<int64_t> places;
};

struct Question {
  std::string spec;
  int64_t m;
  at::ScalarType type;

  bool operator==(const Question& other) const {
    return m == other.m && type == other.type && spec == other.spec;
  }
};

struct HashQuestion {
  size_t operator()(const Question& question) const {
    const auto rest = static_cast<size_t>(question.m) * 64 + static_cast<size_t>(question.type);
    return std::hash<std::string>()(question.spec) ^ rest * 0x9e3779b97f4a7c15u;
  }
};

// Never destroyed: they hold Python objects, and Python may be gone by then.
struct Memory {
  std::shared_mutex mutex;
  std::unordered_map<Question, std::shared_ptr<const Remembered>, HashQuestion> answers;
  py::object ask;  // the operator in Python
};

Memory& memory() {
  static auto* held = new Memory;
  return *held;
}

std::shared_ptr<const Remembered> recall(const Question& question) {
  const std::shared_lock<std::shared_mutex> lock(memory().mutex);
  const auto found = memory().answers.find(question);
  return found == memory().answers.end() ? nullptr : found->second;
}

at::Tensor linear_operator(const at::Tensor& x, at::TensorList buffers, const Optional& bias,
                           std::string_view spec) {
  const int64_t k = x.dim() > 0 ? x.size(-1) : 0;
  std::shared_ptr<const Remembered> known;
  if (k > 0) known = recall({std::string(spec), x.numel() / k, x.scalar_type()});
  if (known == nullptr || known->k != k) {
    const py::gil_scoped_acquire acquired;
    std::vector<at::Tensor> list(buffers.begin(), buffers.end());
    return memory().ask(x, std::move(list), bias, std::string(spec)).cast<at::Tensor>();
  }
  const auto buffer = [&](size_t name) -> Optional {
    const int64_t place = known->places[name];
    return place < 0 ? Optional() : Optional(buffers[static_cast<size_t>(place)]);
  };
  at::Tensor rows = x.reshape({-1, k});
  if (const Optional perm = buffer(6)) rows = rows.index_select(1, *perm);
  if (rows.stride(1) != 1) rows = rows.contiguous();
  const at::Tensor y =
      known->integers
          ? known->linear->integers(rows, *buffer(0), *buffer(1), buffer(2), buffer(3), buffer(7),
                                    std::nullopt, bias, x.scalar_type())
          : known->linear->floats(rows, *buffer(0), *buffer(1), buffer(2), buffer(3), buffer(4),
                                  buffer(5), std::nullopt, bias, x.scalar_type());
  if (x.dim() == 2) return y;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = known->n;
  return y.view(shape);
}

void remember(const std::string& spec, int64_t m, at::ScalarType type, const py::object& owner,
              bool integers, int64_t n, int64_t k, std::vector<int64_t> places) {
  require(places.size() == 8, "8 places are wanted, got ", places.size());
  auto answer = std::make_shared<Remembered>(
      Remembered{owner, owner.cast<const CpuLinear*>(), integers, n, k, std::move(places)});
  constexpr size_t kMost = 1 << 16;
  const std::unique_lock<std::shared_mutex> lock(memory().mutex);
  // A long run with ever new M must not fill the memory. What is there is never replaced: another
  // thread, which may not hold Python's lock, could be the last to let go of it.
  if (memory().answers.size() < kMost) {
    memory().answers.try_emplace(Question{spec, m, type}, std::move(answer));
  }
}

// kind: "plain"; "rms_norm" with residual and gain; "silu_mul" with up.
std::tuple<at::Tensor, at::Tensor, Optional, Optional> quantize(
    const at::Tensor& x, const std::string& kind, const Optional& other, const Optional& gain,
    double epsilon, const std::string& scale_of, const Optional& given_scale,
    const std::string& isa) {
  require(x.dim() == 2, "x must have 2 dimensions, got shape ", x.sizes());
  const int64_t m = x.size(0), k = x.size(1);
  check_rows("x", x, k);
  cpu::RowSource source{};
  source.x = x.const_data_ptr();
  source.type = float_type("x", x.scalar_type());
  source.k = k;
  source.x_stride = m > 1 ? x.stride(0) : k;
  source.epsilon = static_cast<float>(epsilon);
  Optional sum, zeros;
  if (other) require(other->scalar_type() == x.scalar_type(), "both inputs must have one type");
  if (kind == "rms_norm") {
    source.kind = cpu::RowSource::Kind::kRmsNorm;
    if (other) {
      check("residual", *other, x.sizes());
      sum = at::empty({m, k}, x.scalar_type());
      source.residual = other->const_data_ptr();
      source.sum = sum->mutable_data_ptr();
    }
    if (gain) {
      check("gain", *gain, {k});
      source.gain = gain->const_data_ptr();
      source.gain_type = float_type("gain", gain->scalar_type());
    }
  } else if (kind == "silu_mul") {
    source.kind = cpu::RowSource::Kind::kSiluMul;
    require(other.has_value() && other->sizes() == x.sizes(), "up must have the shape of gate");
    check_rows("up", *other, k);
    source.up = other->const_data_ptr();
    source.up_stride = m > 1 ? other->stride(0) : k;
  } else {
    require(kind == "plain", "kind must be plain, rms_norm or silu_mul, got ", kind);
  }
  const float* given = nullptr;
  cpu::ScaleOf scale = cpu::ScaleOf::kRow;
  if (scale_of == "tensor") scale = cpu::ScaleOf::kTensor;
  if (scale_of == "static") {
    require(given_scale.has_value(), "a static scale must be given");
    check("scale", *given_scale, {}, at::kFloat);
    given = given_scale->const_data_ptr<float>();
    scale = cpu::ScaleOf::kGiven;
  }
  const cpu::Isa level = isa_of(isa);
  const char* missing = cpu::why_not(level);
  require(missing == nullptr, isa, ": ", missing == nullptr ? "" : missing);
  at::Tensor quantized = at::empty({m, k}, at::kChar), scales = at::empty({m}, at::kFloat);
  if (scale_of == "asymmetric") zeros = at::empty({m}, at::kInt);
  {
    py::gil_scoped_release released;
    cpu::quantize_rows(source, m, scale, given, quantized.mutable_data_ptr<int8_t>(),
                       scales.mutable_data_ptr<float>(),
                       zeros ? zeros->mutable_data_ptr<int32_t>() : nullptr, level, torch_pool());
  }
  return {quantized, scales, zeros, sum};
}

void pack_vnni(const at::Tensor& codes, const at::Tensor& words, int64_t first_row, bool nibbles) {
  const int64_t rows = codes.dim() == 2 ? codes.size(0) : 0, k = rows ? codes.size(1) : 0;
  check("codes", codes, {rows, k}, at::kByte);
  const int64_t steps = cpu::padded_columns(k) / (nibbles ? 8 : 4);
  check("words", words, {words.dim() == 3 ? words.size(0) : 0, steps, cpu::kLanes}, at::kInt);
  const int64_t panel = first_row / cpu::kLanes;
  require(first_row % cpu::kLanes == 0 && first_row >= 0,
          "first_row must be a multiple of 16, got ", first_row);
  require(panel + ceil_div(rows, cpu::kLanes) <= words.size(0), "rows ", first_row, " to ",
          first_row + rows, " do not fit words of shape ", words.sizes());
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>());
  py::gil_scoped_release released;
  cpu::pack_vnni(codes.const_data_ptr<uint8_t>(), to + panel * steps * cpu::kLanes, rows, k,
                 nibbles, torch_pool());
}

at::Tensor unpack_vnni(const at::Tensor& words, int64_t first_row, int64_t rows, int64_t k,
                       bool nibbles) {
  const int64_t steps = cpu::padded_columns(k) / (nibbles ? 8 : 4);
  const int64_t panels = words.dim() == 3 ? words.size(0) : 0;
  check("words", words, {panels, steps, cpu::kLanes}, at::kInt);
  require(first_row >= 0 && rows >= 0 && first_row + rows <= panels * cpu::kLanes, "rows ",
          first_row, " to ", first_row + rows, " are not in words of shape ", words.sizes());
  at::Tensor codes = at::empty({rows, k}, at::kByte);
  py::gil_scoped_release released;
  cpu::unpack_vnni(reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()),
                   codes.mutable_data_ptr<uint8_t>(), first_row, rows, k, nibbles, torch_pool());
  return codes;
}

std::optional<std::string> why_no_isa(const std::string& name) {
  const char* reason = cpu::why_not(isa_of(name));
  return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
}

py::dict cpu_peaks(int threads, double seconds) {
  require(threads >= 1, "threads must be 1 or more, got ", threads);
  cpu::Peaks peaks;
  {
    const ReleasedLock released;
    peaks = cpu::measure_peaks(cpu::detected_isa(), seconds, {threads, run_on_torch_threads});
  }
  py::dict out;
  out["read"] = peaks.read;
  out["fp32"] = peaks.fp32;
  out["int8"] = peaks.int8;
  if (peaks.bf16 > 0) out["bf16"] = peaks.bf16;
  return out;
}

}  // namespace

cpu::Pool torch_pool() {
  const int threads = is_forked.load(std::memory_order_relaxed) ? 1 : at::get_num_threads();
  return {threads, run_on_torch_threads};
}

void register_cpu(py::module_& m) {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif
  py::class_<CpuLinear>(m, "CpuLinear", "A weight in the vnni layout, less its tensors.")
      .def(py::init<int64_t, int64_t, int64_t, const std::string&, double, const Optional&,
                    const Optional&, const std::string&, bool, bool, const std::string&>(),
           py::arg("n"), py::arg("k"), py::arg("group"), py::arg("code"), py::arg("middle"),
           py::arg("table"), py::arg("nested_table"), py::arg("isa"), py::arg("tiles"),
           py::arg("rounds_weights"), py::arg("scale_of"))
      .def("floats", &CpuLinear::floats, "y [M, N] of x in fp16, bf16 or fp32")
      .def("integers", &CpuLinear::integers, "y [M, N] by an int8 product");
  m.def(
      "answer_linear", [](const py::object& ask) { memory().ask = ask; }, py::arg("ask"),
      "sets what qkernels::linear calls where it remembers nothing");
  m.def("remember_linear", &remember, "which CpuLinear runs (spec, m, dtype of x)");
  m.def("quantize_rows_cpu", &quantize, "-> int8 [M, K], scales [M], zero points or None, sum");
  m.def("pack_vnni", &pack_vnni, py::arg("codes"), py::arg("words"), py::arg("first_row"),
        py::arg("nibbles"), "codes uint8 [R, K] into words int32 [N/16, steps, 16]");
  m.def("unpack_vnni", &unpack_vnni, py::arg("words"), py::arg("first_row"), py::arg("rows"),
        py::arg("k"), py::arg("nibbles"), "words -> codes uint8 [rows, k]");
  m.def("cpu_peaks", &cpu_peaks, py::arg("threads"), py::arg("seconds"),
        "the most this machine does: bytes read, fp32, int8 and bf16 operations a second");
  m.def("why_no_isa", &why_no_isa, py::arg("name"),
        "why this machine does not run portable, avx2, avx512 or amx, or None");
}

TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("linear", TORCH_FN(linear_operator)); }

}  // namespace qkernels::bindings
