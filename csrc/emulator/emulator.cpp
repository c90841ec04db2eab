#include "emulator/emulator.h"

#include <string>

#include "emulator/accesses.h"
#include "emulator/counters.h"
#include "emulator/launches.h"
#include "emulator/sites.h"

namespace emulator = qkernels::emulator;

extern "C" {

void qkernels_emulator_set_seed(uint64_t seed) { emulator::set_seed(seed); }

void qkernels_emulator_reset() { emulator::reset_counters(); }

void qkernels_emulator_register_region(const char* name, const void* begin, size_t bytes) {
  emulator::register_region(name, begin, bytes);
}

void qkernels_emulator_require_regions(int required) { emulator::require_regions(required != 0); }

void qkernels_emulator_check_races(int checked) { emulator::check_races(checked != 0); }

const char* qkernels_emulator_counters_json() {
  static std::string text;
  text = emulator::counters_json();
  return text.c_str();
}

const char* qkernels_emulator_sites_json() {
  static std::string text;
  text = emulator::sites_json();
  return text.c_str();
}

void qkernels_emulator_disable_site(const char* kind, const char* file_suffix, int line) {
  emulator::disable_site(kind, file_suffix, line);
}

void qkernels_emulator_skip_launches(int skipped) { emulator::skip_launches(skipped != 0); }

void qkernels_emulator_run_last_blocks(int alone) { emulator::run_last_blocks(alone != 0); }

void qkernels_emulator_fail_launches(const char* file_suffix, const char* error) {
  emulator::fail_launches(file_suffix, error);
}
}
