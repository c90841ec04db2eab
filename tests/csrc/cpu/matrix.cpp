// The kernels of csrc/cpu, without torch, over the formats, shapes and schedules that the bindings
// let through: for sanitizers, which do not get along with Python. Numbers are held to a reference
// in tests/test_kernels.py; here the same bytes are asked for whatever the number of threads and,
// of integers, whatever the instructions.
//
//     cpu_matrix [--every=N] [--break] [isa ...]
//
// --every=N runs each Nth case. --break takes the last element off every y, which a sanitizer must
// find. Without names, all instructions that this machine has are tried.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/linear.h"
#include "cpu/vector_portable.h"
#include "cpu/vnni.h"

using namespace qkernels::cpu;

namespace {

// Exactly as long as what they hold, so that AddressSanitizer knows of the first byte beyond.
using Bytes = std::vector<uint8_t>;

constexpr FloatType kFloatTypes[] = {FloatType::kFp16, FloatType::kBf16, FloatType::kFp32};
constexpr const char* kFloatNames[] = {"fp16", "bf16", "fp32"};
constexpr Code kCodes[] = {Code::kInt4, Code::kTable4, Code::kInt8, Code::kFp8E4M3, Code::kFp8E5M2};
constexpr const char* kCodeNames[] = {"int4", "table4", "int8", "fp8e4m3", "fp8e5m2"};
constexpr const char* kGroupNames[] = {"none", "fp16", "bf16", "fp32", "uint8", "nested"};
// Odd, whole panels, fewer and more panels than a task has; K with and without columns that pad it.
constexpr int64_t kShapes[][2] = {{16, 72}, {49, 135}, {80, 200}, {77, 320}, {33, 520}};
constexpr int64_t kRows[] = {0, 1, 3, 17, 41, 70};
constexpr int64_t kWholeK = 1 << 20;
constexpr int64_t kGroups[] = {16, 32, 64, 112, kWholeK};
// From so many products on, plain C++ is too slow under a sanitizer, and then vectors are.
constexpr int64_t kMostPortableProducts = 1 << 18, kMostVectorProducts = 4 << 20;
// Of columns beyond K in a row of x.
constexpr int64_t kGap = 5;

bool breaks = false;

void run_on_new_threads(int threads, void (*body)(void*), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, context);
  body(context);
  for (auto& other : others) other.join();
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int64_t below(int64_t end) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end));
  }
  float between(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_()) / 4294967296.0f;
  }
  std::vector<float> floats(int64_t count, float low, float high) {
    std::vector<float> out(static_cast<size_t>(count));
    for (float& each : out) each = between(low, high);
    return out;
  }
  Bytes bytes(int64_t count, int64_t low, int64_t end) {
    Bytes out(static_cast<size_t>(count));
    for (uint8_t& each : out) each = static_cast<uint8_t>(low + below(end - low));
    return out;
  }
  Bytes numbers(int64_t count, FloatType type, float low, float high) {
    Bytes out(static_cast<size_t>(count * size_of(type)));
    for (int64_t i = 0; i < count; ++i) {
      const float value = between(low, high);
      const uint16_t half = type == FloatType::kFp16 ? float_to_half(value) : float_to_bf16(value);
      const void* from = type == FloatType::kFp32 ? static_cast<const void*>(&value) : &half;
      std::memcpy(out.data() + i * size_of(type), from, static_cast<size_t>(size_of(type)));
    }
    return out;
  }

 private:
  std::mt19937 engine_;
};

// As an output is before a kernel writes it: NaN in each type.
Bytes unwritten(int64_t count, int64_t size) {
  return Bytes(static_cast<size_t>(std::max<int64_t>(count - breaks, 0) * size), 0xff);
}

bool has_nan(const Bytes& values, FloatType type) {
  for (size_t at = 0; at < values.size(); at += static_cast<size_t>(size_of(type))) {
    uint32_t bits = 0;
    std::memcpy(&bits, values.data() + at, static_cast<size_t>(size_of(type)));
    const auto half = static_cast<uint16_t>(bits);
    float value;
    std::memcpy(&value, &bits, 4);
    if (type != FloatType::kFp32) {
      value = type == FloatType::kFp16 ? half_to_float(half) : bf16_to_float(half);
    }
    if (std::isnan(value)) return true;
  }
  return false;
}

template <class T>
const T* or_null(const std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// --- Cases: what is called, by which schedules, and what must agree.

struct Result {
  Bytes bytes;  // all that the kernel wrote
  bool has_nan = false;
};

struct Case {
  std::string name;
  std::vector<Schedule> schedules;
  bool alike;  // in all schedules
  std::function<Result(const Schedule&, const Pool&)> run;
};

// Where rows of int8 have their scales from.
enum class Rows { kFloats, kRow, kTensor, kGiven, kQuantized };
constexpr const char* kRowsNames[] = {"floats", "row", "tensor", "given", "quantized"};

struct Format {
  Code code;
  int64_t group;
  GroupType scales;  // kUint8: with a scale for each row of W, the second level
  GroupType zeros;
  Rows rows;
};

// A product and all its buffers.
struct Product {
  Weight weight{};
  std::vector<uint32_t> words;
  Bytes scales, zeros, x, bias;
  std::vector<float> channel_scales, table, nested_table, nested_absmax, row_scales;
  Rows rows;
  float given = 0.02f;
  int64_t m;
  FloatType x_type, y_type, bias_type;

  Product(const Format& format, int64_t n, int64_t k, int64_t m, FloatType x_type, FloatType y_type,
          Random& random)
      : rows(format.rows), m(m), x_type(x_type), y_type(y_type) {
    weight.n = n;
    weight.k = k;
    weight.group = std::min(format.group, k);
    weight.code = format.code;
    const bool two_levels = format.scales == GroupType::kUint8;
    int64_t codes = 256;
    if (is_nibble(weight.code)) codes = 16;
    // Codes of 3 bits are decoded by a table of their own.
    if (weight.code == Code::kInt4 && !two_levels && random.below(3) == 0) codes = 8;
    const bool integers = weight.code == Code::kInt4 || weight.code == Code::kInt8;
    weight.middle = integers ? static_cast<float>(codes / 2) : 0.0f;
    weight.prepare();
    fill_words(codes, random);
    const int64_t count = weight.panels() * weight.groups() * kLanes;
    weight.scale_type = format.scales;
    if (two_levels) {
      // multiplier * (code - zero) fits a signed byte, as the format has it.
      scales = random.bytes(count, 1, 8);
      channel_scales = random.floats(n, 0.001f, 0.01f);
    } else if (format.scales == GroupType::kNested) {
      scales = random.bytes(count, 0, 256);
      nested_table = random.floats(256, -1, 1);
      nested_absmax = random.floats(divide_up(n * weight.groups(), 256), 0.001f, 0.01f);
      weight.nested_offset = 0.02f;
    } else {
      scales = random.numbers(count, float_type(format.scales), 0.001f, 0.02f);
    }
    weight.zero_type = format.zeros;
    if (format.zeros == GroupType::kUint8) zeros = random.bytes(count, 0, codes);
    if (format.zeros == GroupType::kFp16) zeros = random.numbers(count, FloatType::kFp16, 0, 15);
    if (weight.code == Code::kTable4) table = random.floats(16, -1, 1);
    fill_rows(random);
    weight.words = words.data();
    weight.scales = scales.data();
    weight.zeros = or_null(zeros);
    weight.channel_scales = or_null(channel_scales);
    weight.table = or_null(table);
    weight.nested_table = or_null(nested_table);
    weight.nested_absmax = or_null(nested_absmax);
  }

  static FloatType float_type(GroupType type) {
    return kFloatTypes[static_cast<int>(type) - static_cast<int>(GroupType::kFp16)];
  }

  void fill_words(int64_t codes, Random& random) {
    Bytes rows = random.bytes(weight.n * weight.k, 0, codes);
    for (uint8_t& code : rows) {
      // No code stands for NaN or infinity.
      if (weight.code == Code::kFp8E4M3 && (code & 0x7f) == 0x7f) code = 0x7e;
      if (weight.code == Code::kFp8E5M2 && (code & 0x7f) >= 0x7c) code = 0x3c;
    }
    words.assign(static_cast<size_t>(weight.panels() * weight.panel_words()), 0);
    const Pool pool{1, run_on_new_threads};
    pack_vnni(rows.data(), words.data(), weight.n, weight.k, is_nibble(weight.code), pool);
  }

  int64_t stride() const { return m > 1 ? weight.k + kGap : weight.k; }

  void fill_rows(Random& random) {
    const int64_t elements = m == 0 ? 0 : (m - 1) * stride() + weight.k;
    if (rows == Rows::kQuantized)
      x = random.bytes(elements, 0, 256);
    else
      x = random.numbers(elements, x_type, -3, 3);
    const bool scaled = rows == Rows::kQuantized || (rows == Rows::kFloats && random.below(3) == 0);
    if (scaled) row_scales = random.floats(m, 0.01f, 0.1f);
    bias_type = kFloatTypes[random.below(3)];
    if (random.below(2) == 0) bias = random.numbers(weight.n, bias_type, -1, 1);
  }

  Result run(const Schedule& schedule, const Pool& pool) const {
    Bytes y = unwritten(m * weight.n, size_of(y_type));
    const Output out{y.data(), y_type, or_null(row_scales), or_null(bias), bias_type};
    if (rows == Rows::kFloats) {
      linear_float({weight, m, weight.k, x.data(), x_type, stride(), out}, schedule, pool);
    } else {
      Int8Arguments arguments{};
      arguments.weight = weight;
      arguments.m = m;
      arguments.k = weight.k;
      arguments.out = out;
      if (rows == Rows::kQuantized) {
        arguments.quantized = reinterpret_cast<const int8_t*>(x.data());
        arguments.quantized_stride = stride();
      } else {
        arguments.source.x = x.data();
        arguments.source.type = x_type;
        arguments.source.k = weight.k;
        arguments.source.x_stride = stride();
        if (rows == Rows::kTensor) arguments.scale_of = ScaleOf::kTensor;
        if (rows == Rows::kGiven) arguments.scale_of = ScaleOf::kGiven;
        if (rows == Rows::kGiven) arguments.given_scale = &given;
      }
      // Without rows there is no pointer, by which rows that are quantized are told from others.
      if (rows != Rows::kQuantized || m > 0) linear_int8(arguments, schedule, pool);
    }
    const bool nan = has_nan(y, y_type);
    return {std::move(y), nan};
  }

  // What the bindings let through, of `isas`.
  std::vector<Schedule> schedules(const std::vector<Isa>& isas) const {
    std::vector<Schedule> out;
    for (Isa isa : isas) {
      const int64_t most = isa == Isa::kPortable ? kMostPortableProducts : kMostVectorProducts;
      if (m * weight.n * weight.k <= most) out.push_back({isa, false, false});
      if (isa != Isa::kAmx) continue;
      if (rows == Rows::kFloats) {
        if (weight.groups() == 1 || fits_float_tiles(weight.group))
          out.push_back({isa, true, false});
        const bool bf16 = x_type == FloatType::kBf16 && y_type == FloatType::kBf16;
        if (bf16) out.push_back({isa, true, true});
      } else if (weight.sums_are_integers() || fits_int8_tiles(weight.group)) {
        out.push_back({isa, true, false});
      }
    }
    return out;
  }
};

class Matrix {
 public:
  explicit Matrix(const std::vector<Isa>& isas) : isas_(isas) {}

  std::vector<Case> cases;

  void add_product(const Format& format, int64_t n, int64_t k, int64_t m, FloatType x,
                   FloatType y) {
    const auto product = std::make_shared<const Product>(format, n, k, m, x, y, random_);
    char name[200];
    std::snprintf(
        name, sizeof name, "%s group %d scales %s zeros %s n %d k %d m %d rows %s x %s y %s",
        kCodeNames[static_cast<int>(format.code)], static_cast<int>(product->weight.group),
        kGroupNames[static_cast<int>(format.scales)], kGroupNames[static_cast<int>(format.zeros)],
        static_cast<int>(n), static_cast<int>(k), static_cast<int>(m),
        kRowsNames[static_cast<int>(format.rows)], kFloatNames[static_cast<int>(x)],
        kFloatNames[static_cast<int>(y)]);
    cases.push_back({name, product->schedules(isas_), format.rows != Rows::kFloats,
                     [product](const Schedule& schedule, const Pool& pool) {
                       return product->run(schedule, pool);
                     }});
  }

  // Each format, with what else there is drawn at random: once in bf16, for the sake of weights
  // that are rounded, and once in another type.
  void add_format(const Format& format) {
    for (bool bf16 : {true, false}) {
      const auto& shape = kShapes[random_.below(5)];
      const FloatType x = bf16               ? FloatType::kBf16
                          : random_.below(2) ? FloatType::kFp16
                                             : FloatType::kFp32;
      const FloatType y = random_.below(3) > 0 || bf16 ? x : kFloatTypes[random_.below(3)];
      add_product(format, shape[0], shape[1], kRows[random_.below(6)], x, y);
    }
  }

  void add_formats() {
    const auto scales = {GroupType::kFp16, GroupType::kBf16, GroupType::kFp32};
    for (int64_t group : kGroups) {
      for (Code code : kCodes) {
        for (GroupType zeros : {GroupType::kNone, GroupType::kUint8, GroupType::kFp16}) {
          for (GroupType type : scales) add_format({code, group, type, zeros, Rows::kFloats});
          add_format({code, group, GroupType::kNested, zeros, Rows::kFloats});
        }
      }
      for (Rows rows : {Rows::kRow, Rows::kTensor, Rows::kGiven, Rows::kQuantized}) {
        for (GroupType zeros : {GroupType::kNone, GroupType::kUint8}) {
          for (GroupType type : scales) {
            add_format({Code::kInt4, group, type, zeros, rows});
            add_format({Code::kInt8, group, type, zeros, rows});
          }
          // Two levels are of codes of 4 bits alone: see scheme.py.
          add_format({Code::kInt4, group, GroupType::kUint8, zeros, rows});
        }
      }
    }
  }

  // Sizes from which on work is split: K in parts; many tasks of panels; rows in several blocks;
  // tiles whose x outgrows the cache.
  void add_sizes() {
    constexpr int64_t kSizes[][3] = {{33, 2100, 3}, {145, 72, 17},   {16, 960, 70},
                                     {16, 72, 530}, {49, 1100, 512}, {33, 4200, 300}};
    for (const auto& size : kSizes) {
      for (int64_t group : {int64_t{64}, kWholeK}) {
        const auto add = [&](const Format& format, FloatType x) {
          add_product(format, size[0], size[1], size[2], x, x);
        };
        const GroupType half = GroupType::kFp16, none = GroupType::kNone, byte = GroupType::kUint8;
        add({Code::kInt4, group, half, byte, Rows::kFloats}, FloatType::kBf16);
        add({Code::kFp8E4M3, group, half, none, Rows::kFloats}, FloatType::kBf16);
        add({Code::kTable4, group, GroupType::kNested, none, Rows::kFloats}, FloatType::kFp32);
        add({Code::kInt8, group, half, byte, Rows::kTensor}, FloatType::kFp16);
        add({Code::kInt4, group, half, none, Rows::kRow}, FloatType::kFp32);
        add({Code::kInt4, group, byte, byte, Rows::kQuantized}, FloatType::kBf16);
      }
    }
  }

  void add_quantization(RowSource::Kind kind, FloatType type, bool residual, bool gain,
                        ScaleOf scale_of, bool asymmetric, int64_t m, int64_t k) {
    struct Inputs {
      Bytes x, other, gain;
      float given = 0.03f;
    };
    const auto inputs = std::make_shared<Inputs>();
    const int64_t stride = k + kGap, elements = m == 0 ? 0 : (m - 1) * stride + k;
    inputs->x = random_.numbers(elements, type, -3, 3);
    inputs->other = random_.numbers(residual ? m * k : elements, type, -3, 3);
    const FloatType gain_type = kFloatTypes[random_.below(3)];
    if (gain) inputs->gain = random_.numbers(k, gain_type, 0, 2);
    std::vector<Schedule> schedules;
    for (Isa isa : isas_) schedules.push_back({isa, false, false});
    const auto run = [=](const Schedule& schedule, const Pool& pool) {
      Bytes sum = unwritten(residual ? m * k : 0, size_of(type)), rows = unwritten(m * k, 1);
      RowSource source{kind,    inputs->x.data(), type,      k,     stride,  nullptr,
                       nullptr, nullptr,          gain_type, 1e-5f, nullptr, 0};
      if (residual) source.residual = inputs->other.data();
      if (residual) source.sum = sum.data();
      source.gain = or_null(inputs->gain);
      if (kind == RowSource::Kind::kSiluMul) source.up = inputs->other.data();
      if (kind == RowSource::Kind::kSiluMul) source.up_stride = stride;
      Bytes scales = unwritten(m, 4), zeros = unwritten(asymmetric ? m : 0, 4);
      // A null pointer would say that no zero points are wanted.
      if (asymmetric && m == 0) return Result{};
      quantize_rows(source, m, scale_of, scale_of == ScaleOf::kGiven ? &inputs->given : nullptr,
                    reinterpret_cast<int8_t*>(rows.data()), reinterpret_cast<float*>(scales.data()),
                    asymmetric ? reinterpret_cast<int32_t*>(zeros.data()) : nullptr, schedule.isa,
                    pool);
      Result result{rows, has_nan(scales, FloatType::kFp32) || has_nan(sum, type)};
      for (const Bytes* more : {&scales, &zeros, &sum}) {
        result.bytes.insert(result.bytes.end(), more->begin(), more->end());
      }
      return result;
    };
    char name[120];
    std::snprintf(name, sizeof name,
                  "quantize_rows %d %s residual %d gain %d scale %d asymmetric %d "
                  "m %d k %d",
                  static_cast<int>(kind), kFloatNames[static_cast<int>(type)], residual, gain,
                  static_cast<int>(scale_of), asymmetric, static_cast<int>(m), static_cast<int>(k));
    // Norms and gates are computed in floats, where instructions differ in how they round.
    cases.push_back({name, schedules, kind == RowSource::Kind::kPlain, run});
  }

  void add_quantizations() {
    for (FloatType type : kFloatTypes) {
      for (int scale = 0; scale < 4; ++scale) {
        const auto add = [&](RowSource::Kind kind, bool residual, bool gain) {
          const auto scale_of = static_cast<ScaleOf>(scale % 3);
          // The last is large enough for several threads.
          for (auto [m, k] : {std::pair{0, 72}, {1, 16}, {3, 135}, {70, 1000}}) {
            add_quantization(kind, type, residual, gain, scale_of, scale == 3, m, k);
          }
        };
        add(RowSource::Kind::kPlain, false, false);
        for (bool residual : {false, true}) {
          for (bool gain : {false, true}) add(RowSource::Kind::kRmsNorm, residual, gain);
        }
        add(RowSource::Kind::kSiluMul, false, false);
      }
    }
  }

  // Packs and unpacks, all rows and some from the middle on; what comes back must be what went in.
  void add_packing() {
    for (bool nibbles : {true, false}) {
      for (auto [n, k] : {std::pair{1, 1}, {16, 72}, {49, 135}, {80, 321}}) {
        const Bytes codes = random_.bytes(n * k, 0, nibbles ? 16 : 256);
        const int64_t rows = n, columns = k;
        const auto run = [=](const Schedule&, const Pool& pool) {
          const int64_t words = divide_up(rows, kLanes) * kLanes * padded_columns(columns);
          std::vector<uint32_t> packed(static_cast<size_t>(words / (nibbles ? 8 : 4)), ~0u);
          pack_vnni(codes.data(), packed.data(), rows, columns, nibbles, pool);
          Bytes back = unwritten(rows * columns, 1);
          unpack_vnni(packed.data(), back.data(), 0, rows, columns, nibbles, pool);
          const int64_t first = rows / 2;
          Bytes some(static_cast<size_t>((rows - first) * columns), 0xff);
          unpack_vnni(packed.data(), some.data(), first, rows - first, columns, nibbles, pool);
          const bool same = back == codes &&
                            std::equal(some.begin(), some.end(), codes.begin() + first * columns);
          return Result{back, !same};
        };
        const std::string name = "vnni n " + std::to_string(n) + " k " + std::to_string(k);
        cases.push_back({name, {{Isa::kPortable, false, false}}, true, run});
      }
    }
  }

 private:
  std::vector<Isa> isas_;
  Random random_{20240607};
};

std::string where(const Case& each, const Schedule& schedule, const char* how) {
  return each.name + " on " + name_of(schedule.isa) + (schedule.tiles ? " tiles" : "") +
         (schedule.rounds_weights ? " rounded" : "") + ": " + how;
}

// The results of a case, one for each schedule; adds to `failures`.
std::vector<Bytes> results_of(const Case& each, std::vector<std::string>& failures) {
  std::vector<Bytes> results;
  for (const Schedule& schedule : each.schedules) {
    for (int threads = 1; threads <= 3; ++threads) {
      Result result = each.run(schedule, {threads, run_on_new_threads});
      if (result.has_nan) failures.push_back(where(each, schedule, "NaN, or not what went in"));
      if (threads == 1)
        results.push_back(std::move(result.bytes));
      else if (result.bytes != results.back()) {
        failures.push_back(where(each, schedule, "the number of threads makes a difference"));
      }
    }
    // Of rows quantized alike, all sums are exact integers until the very same roundings.
    if (each.alike && results.back() != results.front()) {
      failures.push_back(where(each, schedule, "unlike the first schedule"));
    }
  }
  return results;
}

}  // namespace

int main(int count, char** arguments) {
  int64_t every = 1;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--break")
      breaks = true;
    else if (argument.rfind("--every=", 0) == 0)
      every = std::atoll(argument.c_str() + 8);
    else
      names.push_back(argument);
  }
  std::vector<Isa> isas;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    const bool wanted =
        names.empty() || std::find(names.begin(), names.end(), name_of(isa)) != names.end();
    if (wanted && why_not(isa) == nullptr) isas.push_back(isa);
  }
  if (every < 1 || isas.empty()) {
    std::fprintf(stderr, "no instructions to try, or --every below 1\n");
    return 2;
  }

  Matrix matrix(isas);
  matrix.add_formats();
  matrix.add_sizes();
  matrix.add_quantizations();
  matrix.add_packing();
  std::vector<Case> cases;
  for (size_t i = 0; i < matrix.cases.size(); i += static_cast<size_t>(every)) {
    cases.push_back(std::move(matrix.cases[i]));
  }

  std::vector<std::string> failures;
  std::vector<std::vector<Bytes>> expected;
  for (const Case& each : cases) expected.push_back(results_of(each, failures));

  // All of it again from several threads at once, as a server calls: each has scratch of its own.
  constexpr size_t kCallers = 4;
  std::vector<std::string> found[kCallers];
  std::vector<std::thread> callers;
  for (size_t caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < cases.size(); ++i) {
        for (size_t s = 0; s < cases[i].schedules.size(); ++s) {
          const Schedule& schedule = cases[i].schedules[s];
          if (cases[i].run(schedule, {2, run_on_new_threads}).bytes == expected[i][s]) continue;
          found[caller].push_back(where(cases[i], schedule, "another result beside other callers"));
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& some : found) failures.insert(failures.end(), some.begin(), some.end());

  for (const std::string& failure : failures) std::printf("%s\n", failure.c_str());
  std::printf("%zu cases, %zu failures, up to %s\n", cases.size(), failures.size(),
              name_of(isas.back()));
  return failures.empty() ? 0 : 1;
}
