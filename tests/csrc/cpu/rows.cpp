// Rows that are quantized to int8: as they come, normalized or gated.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>

#include "cases.h"
#include "truth.h"

namespace cases {

using namespace qkernels::cpu;

namespace {

constexpr const char* kKindNames[] = {"plain",   "rms_norm",   "silu_mul", "scaled",
                                      "product", "layer_norm", "gelu_mul", "gelu_tanh_mul"};
constexpr const char* kScaleNames[] = {"row", "tensor", "given"};
// Of columns beyond K in a row of x.
constexpr int64_t kGap = 5;
// How many rows there are of which each tries something of its own.
constexpr int64_t kHardRows = 8;

struct Form {
  RowSource::Kind kind;
  FloatType type;
  bool residual, gain;
  ScaleOf scale_of;
  bool asymmetric;
  int64_t m, k;
  bool rounds_first = false, adds_one = false;
  // Of norms and gates: whether rows are rounded, and given as they are quantized.
  bool rounds = false;
};

class Quantization {
 public:
  Quantization(const Form& form, Random& random)
      : form_(form), gain_type_(kFloatTypes[random.below(3)]) {
    const int64_t elements = form.m == 0 ? 0 : (form.m - 1) * stride() + form.k;
    x_ = random.numbers(elements, form.type, -3, 3);
    other_ = random.numbers(form.residual ? form.m * form.k : elements, form.type, -3, 3);
    if (form.gain) gain_ = random.numbers(form.k, gain_type_, 0, 2);
    if (form.gain && form.kind == RowSource::Kind::kLayerNorm) {
      bias_type_ = kFloatTypes[random.below(3)];
      bias_ = random.numbers(form.k, bias_type_, -1, 1);
    }
    if (form.kind == RowSource::Kind::kScaled) factors_ = random.floats(form.m, 0.1f, 2);
    if (form.m > kHardRows) add_hard_rows();
  }

  std::string name() const {
    char text[200];
    std::snprintf(text, sizeof text,
                  "quantize_rows %s %s residual %d gain %d scale %s asymmetric %d rounds %d rounds "
                  "first %d adds one %d m %d k %d",
                  kKindNames[static_cast<int>(form_.kind)], name_of(form_.type), form_.residual,
                  form_.gain, kScaleNames[static_cast<int>(form_.scale_of)], form_.asymmetric,
                  form_.rounds, form_.rounds_first, form_.adds_one, static_cast<int>(form_.m),
                  static_cast<int>(form_.k));
    return text;
  }

  // Values, scales, zero points, x + residual and rounded rows, one after the other.
  Bytes run(const Schedule& schedule, const Pool& pool) const {
    const int64_t m = form_.m, elements = m * form_.k;
    Bytes values = unwritten(elements, 1), scales = unwritten(m, 4);
    Bytes zeros = unwritten(form_.asymmetric ? m : 0, 4);
    Bytes sum = unwritten(form_.residual ? elements : 0, size_of(form_.type));
    Bytes y = unwritten(is_rounded() ? elements : 0, size_of(form_.type));
    // A null pointer would say that no zero points are wanted.
    if (form_.asymmetric && m == 0) return {};
    RowSource rows = source();
    if (form_.residual) rows.sum = sum.data();
    if (is_rounded()) rows.y = y.data();
    auto* zeros_out = form_.asymmetric ? reinterpret_cast<int32_t*>(zeros.data()) : nullptr;
    quantize_rows(rows, m, form_.scale_of, given(), reinterpret_cast<int8_t*>(values.data()),
                  reinterpret_cast<float*>(scales.data()), zeros_out, schedule.isa, pool);
    for (const Bytes* more : {&scales, &zeros, &sum, &y}) {
      values.insert(values.end(), more->begin(), more->end());
    }
    return values;
  }

  std::string complaint(const Bytes& result) const {
    if (form_.m == 0) return "";
    const auto m = static_cast<size_t>(form_.m);
    truth::Rows got;
    got.values.resize(m * static_cast<size_t>(form_.k));
    got.scales.resize(m);
    got.zeros.resize(form_.asymmetric ? m : 0);
    const uint8_t* at = result.data();
    const auto take = [&](void* to, size_t size) {
      if (size > 0) std::memcpy(to, at, size);
      at += size;
    };
    take(got.values.data(), got.values.size());
    take(got.scales.data(), got.scales.size() * 4);
    take(got.zeros.data(), got.zeros.size() * 4);
    RowSource rows = source();
    const uint8_t* y = at + (form_.residual ? form_.m * form_.k * size_of(form_.type) : 0);
    if (is_rounded()) rows.y = const_cast<uint8_t*>(y);
    std::string wrong = truth::complaint(rows, form_.m, form_.scale_of, given(), got);
    if (wrong.empty() && is_rounded()) wrong = truth::complaint_about_rounded(rows, form_.m);
    if (!wrong.empty() || !form_.residual) return wrong;
    return truth::complaint_about_sum(rows, form_.m, at);
  }

 private:
  bool is_rounded() const {
    return form_.rounds || form_.kind == RowSource::Kind::kScaled ||
           form_.kind == RowSource::Kind::kProduct;
  }
  int64_t stride() const { return form_.k + kGap; }
  const float* given() const { return form_.scale_of == ScaleOf::kGiven ? &given_ : nullptr; }

  RowSource source() const {
    RowSource out{};
    out.kind = form_.kind;
    out.x = x_.data();
    out.type = form_.type;
    out.k = form_.k;
    out.x_stride = stride();
    out.epsilon = 1e-5f;
    if (form_.residual) out.residual = other_.data();
    out.gain = or_null(gain_);
    out.gain_type = gain_type_;
    out.bias = or_null(bias_);
    out.bias_type = bias_type_;
    out.factors = or_null(factors_);
    out.rounds_first = form_.rounds_first;
    out.adds_one = form_.adds_one;
    if (out.is_gate() || form_.kind == RowSource::Kind::kProduct) {
      out.up = other_.data();
      out.up_stride = stride();
    }
    return out;
  }

  template <class Value>
  void fill(int64_t row, const Value& value) {
    for (int64_t c = 0; c < form_.k; ++c) {
      truth::store_at(x_.data(), form_.type, row * stride() + c, value(c));
    }
  }

  void add_hard_rows() {
    const int64_t last = form_.k - 1;
    const auto half = [](int64_t c) { return static_cast<double>(c * 7 % 253 - 126) / 2; };
    // Halves of a scale of one, which the largest element, the last, makes it: ties of the
    // rounding.
    fill(0, [&](int64_t c) { return c == last ? 127 : half(c); });
    fill(1, [&](int64_t c) { return c == last ? 128 : c == 0 ? -127 : half(c); });
    // Ties at a scale whose reciprocal is no number of fp32.
    constexpr double kScale = 0.0123f;
    fill(2, [&](int64_t c) { return c == last ? 127 * kScale : (2 * half(c) + 0.5) * kScale; });
    fill(3, [](int64_t) { return 0; });
    // So small that the epsilon of a norm counts; so large that a gate is open or closed.
    fill(4, [&](int64_t c) { return half(c) * 1e-4; });
    fill(5, [&](int64_t c) { return half(c) * 2; });
    // One such row would spoil the scale of all.
    if (form_.scale_of == ScaleOf::kTensor) return;
    fill(6, [&](int64_t c) { return c == last ? NAN : half(c); });
    fill(7, [&](int64_t c) { return c == last ? -INFINITY : half(c); });
  }

  Form form_;
  FloatType gain_type_, bias_type_ = FloatType::kFp32;
  Bytes x_, other_, gain_, bias_;
  std::vector<float> factors_;
  float given_ = 0.5f;
};

}  // namespace

void make_rows(const Options& options, Random& random, const Take& take) {
  std::vector<Schedule> schedules;
  for (Isa isa : options.isas) schedules.push_back({isa, false, false});
  const auto add_drawn = [&](const Form& form, Random& drawn) {
    take([&]() -> Case {
      const auto rows = std::make_shared<const Quantization>(form, drawn);
      return {
          rows->name(), schedules,
          [rows](const Schedule& schedule, const Pool& pool) { return rows->run(schedule, pool); },
          [rows](const Bytes& result, const Schedule&) { return rows->complaint(result); }};
    });
  };
  const auto add = [&](const Form& form) { add_drawn(form, random); };
  // The last is large enough for several threads.
  for (auto [m, k] : {std::pair{0, 72}, {1, 16}, {3, 135}, {70, 1000}}) {
    for (FloatType type : kFloatTypes) {
      for (int scale = 0; scale < 4; ++scale) {
        const auto scale_of = static_cast<ScaleOf>(scale % 3);
        const bool asymmetric = scale == 3;
        add({RowSource::Kind::kPlain, type, false, false, scale_of, asymmetric, m, k});
        add({RowSource::Kind::kSiluMul, type, false, false, scale_of, asymmetric, m, k});
        add({RowSource::Kind::kProduct, type, false, false, scale_of, asymmetric, m, k});
        for (bool rounds_first : {false, true}) {
          for (bool adds_one : {false, true}) {
            add({RowSource::Kind::kScaled, type, false, true, scale_of, asymmetric, m, k,
                 rounds_first, adds_one});
          }
        }
        for (bool residual : {false, true}) {
          for (bool gain : {false, true}) {
            add({RowSource::Kind::kRmsNorm, type, residual, gain, scale_of, asymmetric, m, k});
          }
        }
      }
    }
  }
  // Drawn apart: of those above and below, each is what it was without these.
  Random own(170);
  for (auto [m, k] : {std::pair{0, 72}, {1, 16}, {3, 135}, {70, 500}}) {
    for (FloatType type : kFloatTypes) {
      for (int scale = 0; scale < 4; ++scale) {
        const auto scale_of = static_cast<ScaleOf>(scale % 3);
        const bool asymmetric = scale == 3;
        for (bool rounds : {false, true}) {
          const auto add_fused = [&](RowSource::Kind kind, bool residual, bool gain) {
            add_drawn(
                {kind, type, residual, gain, scale_of, asymmetric, m, k, false, false, rounds},
                own);
          };
          add_fused(RowSource::Kind::kGeluMul, false, false);
          add_fused(RowSource::Kind::kGeluTanhMul, false, false);
          for (bool both : {false, true}) add_fused(RowSource::Kind::kLayerNorm, both, both);
          if (!rounds) continue;
          add_fused(RowSource::Kind::kSiluMul, false, false);
          add_fused(RowSource::Kind::kRmsNorm, true, true);
        }
      }
    }
  }
}

}  // namespace cases
