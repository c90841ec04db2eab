// What Python sees of routes: it makes them, and is one where no compiled route runs a weight.

#pragma once

#include <torch/csrc/utils/pybind.h>

namespace qkernels::bindings {

void register_routes(pybind11::module_& m);

}  // namespace qkernels::bindings
