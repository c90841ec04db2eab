// The parts of qkernels._C that call the CPU kernels, and what they share.

#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <string_view>

#include "bindings/checks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/weight.h"

namespace qkernels::bindings {

// torch's threads, as many as torch.set_num_threads says. One after a fork that lost them, where
// starting others would hang.
cpu::Pool torch_pool();

// That level, which this machine must have. Throws ValueError with the reason where it has not.
cpu::Isa isa_here(std::string_view name);

// Throws ValueError for a type that kernels do not read.
cpu::FloatType float_type(const char* name, at::ScalarType type);

// That of scales, zero points and offsets. Throws ValueError for any other.
cpu::GroupType group_type(const char* name, at::ScalarType type);

void register_cpu_routes(pybind11::module_& m);
void register_cpu_rows(pybind11::module_& m);
void register_cpu_packing(pybind11::module_& m);
void register_cpu_embedding(pybind11::module_& m);
void register_cpu_machine(pybind11::module_& m);
void register_cpu_calibration(pybind11::module_& m);
void register_cpu_sparse(pybind11::module_& m);

}  // namespace qkernels::bindings
