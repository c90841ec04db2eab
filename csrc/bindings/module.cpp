// qkernels._C: checks what Python passes in and calls the kernels, which take raw pointers.
//
// operator.cpp is where a layer's call arrives; cpu/ and cuda/ hold the routes that run it.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings/cpu/cpu.h"
#include "bindings/python.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  std::vector<std::string> architectures;
#ifdef QKERNELS_CUDA_ARCHITECTURES
  const bool cuda = true;
  std::istringstream listed(QKERNELS_CUDA_ARCHITECTURES);
  for (std::string each; listed >> each;) architectures.push_back(each);
#else
  const bool cuda = false;
#endif
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
#ifdef __clang__
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  py::dict info;
  info["version"] = QKERNELS_VERSION;
  info["compiler"] = compiler;
  info["cpp_standard"] = static_cast<int>(__cplusplus / 100 % 100);
  info["torch_version"] = TORCH_VERSION;
  info["cuda"] = cuda;
  info["cuda_architectures"] = architectures;
  info["openmp"] = openmp;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of qkernels. Import torch first: its libraries are needed.";
  m.def("build_info", &build_info,
        "version, compiler, cpp_standard, torch_version, cuda, cuda_architectures, openmp");
  qkernels::bindings::register_routes(m);
  qkernels::bindings::register_cpu_routes(m);
  qkernels::bindings::register_cpu_rows(m);
  qkernels::bindings::register_cpu_packing(m);
  qkernels::bindings::register_cpu_embedding(m);
  qkernels::bindings::register_cpu_machine(m);
  qkernels::bindings::register_cpu_calibration(m);
  qkernels::bindings::register_cpu_sparse(m);
}
