#include "emulator/sites.h"

#include <array>
#include <map>
#include <memory>
#include <tuple>

namespace qkernels::emulator {
namespace {

struct Disabled {
  std::string kind, file_suffix;
  int line = 0;
};

struct Slot {
  const char* file = nullptr;
  Site* site = nullptr;
};

// The compiler makes one string a file and translation unit, so its address finds a site fast.
constexpr size_t kSlots = 4096;

struct Sites {
  std::map<std::tuple<Kind, int, std::string, int>, std::unique_ptr<Site>> by_place;
  std::vector<Site*> in_order;
  std::array<Slot, kSlots> slots;
  Disabled disabled;
};

Sites& sites() {
  static Sites sites;
  return sites;
}

bool is_disabled(const Site& site) {
  const Disabled& rule = sites().disabled;
  return rule.kind == name_of(site.kind) && rule.line == site.line &&
         ends_with(site.file, rule.file_suffix);
}

Site& find_slowly(Kind kind, int bytes, Place place) {
  auto& site = sites().by_place[{kind, bytes, place.file, place.line}];
  if (site == nullptr) {
    site = std::make_unique<Site>();
    site->kind = kind;
    site->bytes = bytes;
    site->file = place.file;
    site->line = place.line;
    site->disabled = is_disabled(*site);
    sites().in_order.push_back(site.get());
  }
  return *site;
}

}  // namespace

const char* name_of(Kind kind) {
  static constexpr std::array<const char*, kKinds> kNames = {
      "load_global",       "load_global_written",
      "store_global",      "atomic_add",
      "count_block",       "copy_async_16",
      "copy_async_commit", "copy_async_wait",
      "load_shared",       "store_shared",
      "ldmatrix",          "mma",
      "movmatrix",         "shuffle",
      "sync_threads",      "sync_warp",
      "start_next_kernel", "wait_for_kernels_before",
      "prefetch",          "within"};
  return kNames[static_cast<size_t>(kind)];
}

bool ends_with(const std::string& path, const std::string& suffix) {
  return path.size() >= suffix.size() &&
         path.compare(path.size() - suffix.size(), suffix.size(), suffix) == 0;
}

std::string Site::where() const { return file + ":" + std::to_string(line); }

Site& find_site(Kind kind, int bytes, Place place) {
  const size_t hash = reinterpret_cast<uintptr_t>(place.file) / 8 * 31 +
                      static_cast<size_t>(place.line) * 256 + static_cast<size_t>(kind) * 16 +
                      static_cast<size_t>(bytes) / 2;
  Slot& slot = sites().slots[hash % kSlots];
  if (slot.file != place.file || slot.site->line != place.line || slot.site->kind != kind ||
      slot.site->bytes != bytes) {
    slot = {place.file, &find_slowly(kind, bytes, place)};
  }
  return *slot.site;
}

const std::vector<Site*>& all_sites() { return sites().in_order; }

void disable_site(const char* kind, const char* file_suffix, int line) {
  sites().disabled = kind == nullptr ? Disabled{} : Disabled{kind, file_suffix, line};
  for (Site* site : sites().in_order) site->disabled = is_disabled(*site);
}

}  // namespace qkernels::emulator
