// What this machine has: instructions, threads, and how fast they are at most.

#include <ATen/Parallel.h>

#include <atomic>
#include <optional>
#include <string>

#include "bindings/cpu/cpu.h"
#include "cpu/linear.h"
#include "cpu/peaks.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#if defined(__linux__)
// omp_pause_resource_all of OpenMP 5: ends the threads that wait for the calling one, until it
// needs some again. By a name of our own, since only newer headers have it, and weak, since only
// newer runtimes do.
extern "C" int pause_openmp(int kind) __asm__("omp_pause_resource_all") __attribute__((weak));
#endif

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

// Whether this process is the child of a fork in which threads were lost.
std::atomic<bool> lost_threads{false};

#if defined(__unix__) || defined(__APPLE__)
thread_local bool is_paused = false;

// A child has but the thread that forks, and GNU's OpenMP, torch's own work with it, waits for ever
// for those it had. Without any, parent and child start their own when they need them.
void pause_threads() {
#if defined(__linux__)
  constexpr int kSoft = 1;  // omp_pause_soft
  is_paused = pause_openmp != nullptr && pause_openmp(kSoft) == 0;
#endif
}

void begin_child() {
  if (!is_paused) lost_threads = true;
}

// torch's first parallel work in a child makes a pool anew in place of one that lost its threads,
// from several threads at once, of which some then find none. Behind all handlers of the fork, one
// of which notes that it has to.
void renew_torch_pool() { at::set_num_threads(at::get_num_threads()); }
#endif

void run_on_torch_threads(int threads, void (*body)(void*), void* context) {
  // The runtime is the one that torch brings: setup.py links no other.
#pragma omp parallel num_threads(threads)
  body(context);
}

cpu::Isa isa_of(std::string_view name) {
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    if (name == cpu::name_of(static_cast<cpu::Isa>(i))) return static_cast<cpu::Isa>(i);
  }
  TORCH_CHECK_VALUE(
      false, "isa must be portable, avx2, avx512, amx, neon, neon_dot or neon_i8mm, got ", name);
}

std::optional<std::string> why_no_isa(const std::string& name) {
  const char* reason = cpu::why_not(isa_of(name));
  return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
}

py::dict cpu_peaks(int threads, double seconds) {
  require(threads >= 1, "threads must be 1 or more, got ", threads);
  cpu::Peaks peaks;
  {
    const py::gil_scoped_release released;
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
  const int threads = lost_threads.load(std::memory_order_relaxed) ? 1 : at::get_num_threads();
  return {threads, run_on_torch_threads};
}

cpu::Isa isa_here(std::string_view name) {
  const cpu::Isa isa = isa_of(name);
  const char* missing = cpu::why_not(isa);
  require(missing == nullptr, name, ": ", missing == nullptr ? "" : missing);
  return isa;
}

cpu::FloatType float_type(const char* name, at::ScalarType type) {
  switch (type) {
    case at::kHalf: return cpu::FloatType::kFp16;
    case at::kBFloat16: return cpu::FloatType::kBf16;
    case at::kFloat: return cpu::FloatType::kFp32;
    default: TORCH_CHECK_VALUE(false, name, " must be fp16, bf16 or fp32, got ", type);
  }
}

void register_cpu_machine(py::module_& m) {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(pause_threads, nullptr, begin_child);
  py::module_::import("os").attr("register_at_fork")(py::arg("after_in_child") =
                                                         py::cpp_function(renew_torch_pool));
#endif
  m.def("cpu_peaks", &cpu_peaks, py::arg("threads"), py::arg("seconds"),
        "the most this machine does: bytes read, fp32, int8 and bf16 operations a second");
  m.def(
      "rounds_on_vectors",
      [](const std::string& isa) { return cpu::rounds_on_vectors(isa_here(isa)); }, py::arg("isa"),
      "whether its vectors multiply pairs of bf16");
  m.def("why_no_isa", &why_no_isa, py::arg("name"),
        "why this machine does not run a set of instructions, by its name in QKERNELS_CPU_ISA, or "
        "None");
}

}  // namespace qkernels::bindings
