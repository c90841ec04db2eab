// What the programs of this folder run csrc/cpu on: the formats, shapes and schedules that the
// bindings let through, with what must come out.

#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cpu/linear.h"
#include "random.h"

namespace cases {

struct Case {
  std::string name;
  std::vector<qkernels::cpu::Schedule> schedules;
  // All that the kernel writes.
  std::function<Bytes(const qkernels::cpu::Schedule&, const qkernels::cpu::Pool&)> run;
  // What is wrong with it, or nothing.
  std::function<std::string(const Bytes&, const qkernels::cpu::Schedule&)> complaint;
};

struct Options {
  std::vector<qkernels::cpu::Isa> isas;
  // Larger ones are left out; in plain C++ and in vectors, those that are too slow under a
  // sanitizer.
  int64_t most_products = int64_t{1} << 40;
  // Elements at the end of each y that its memory has no room for.
  int64_t missing = 0;
};

// Is given what makes each case, and may leave it: in an emulator making all takes far longer than
// running some.
using Take = std::function<void(const std::function<Case()>&)>;

void make_all(const Options& options, const Take& take);
void make_products(const Options& options, Random& random, const Take& take);
void make_blocks(const Options& options, Random& random, const Take& take);
void make_outputs(const Options& options, Random& random, const Take& take);
void make_rows(const Options& options, Random& random, const Take& take);
void make_embeddings(const Options& options, Random& random, const Take& take);
void make_calibration(const Options& options, Random& random, const Take& take);
void make_kept(const Options& options, Random& random, const Take& take);
void make_sparse(const Options& options, Random& random, const Take& take);
void make_outliers(const Options& options, const Take& take);

// The sets of instructions of some names, or of all, that run here.
std::vector<qkernels::cpu::Isa> runnable(const std::vector<std::string>& names);
// Why kernels of `isa` do not run here, or null. Tiles in software need AVX-512 alone.
const char* why_not_here(qkernels::cpu::Isa isa);

// `threads` threads, new but for the caller.
qkernels::cpu::Pool pool_of(int threads);

std::string name_of(const Case& one, const qkernels::cpu::Schedule& schedule);

}  // namespace cases
