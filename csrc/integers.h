// Arithmetic of sizes, for all of csrc.

#pragma once

#include <cstdint>

namespace qkernels {

// a / b, rounded up: a is 0 or more, b above 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace qkernels
