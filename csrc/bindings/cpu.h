// The part of qkernels._C that calls the CPU kernels.

#pragma once

#include <torch/csrc/utils/pybind.h>

#include "cpu/parallel.h"

namespace qkernels::bindings {

// torch's threads, as many as torch.set_num_threads says. One after a fork: the threads are not
// there any more, and starting new ones hangs.
cpu::Pool torch_pool();

void register_cpu(pybind11::module_& m);

}  // namespace qkernels::bindings
