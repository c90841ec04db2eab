#include "emulator/counters.h"

#include <algorithm>
#include <sstream>

namespace qkernels::emulator {
namespace {

constexpr int kBanks = 32;
constexpr uint32_t kBankBytes = 4;

struct Instruction {
  Site* site;
  uint32_t lanes_of_global = 0;
  uint32_t lanes_of_shared = 0;
  uintptr_t global[kLanes];
  uint32_t shared[kLanes];
};

// How often each sector was asked for, by instructions of warps.
struct Traffic {
  int64_t bytes = 0;
  std::vector<uint32_t> times;
};

struct Region {
  std::string name;
  uintptr_t begin, end;
  Traffic read, written;
};

struct Counters {
  Totals totals;
  std::vector<Region> regions;
  size_t last_region = 0;
  std::vector<Instruction> instructions;
  uint64_t meeting = 0;  // stamps that tell what Site::seen_at is about
  uint64_t lane = 0;
};

Counters counters;

Region* region_of(uintptr_t address) {
  auto& regions = counters.regions;
  const auto holds = [&](size_t i) {
    return address >= regions[i].begin && address < regions[i].end;
  };
  if (counters.last_region < regions.size() && holds(counters.last_region)) {
    return &regions[counters.last_region];
  }
  for (size_t i = 0; i < regions.size(); ++i) {
    if (!holds(i)) continue;
    counters.last_region = i;
    return &regions[i];
  }
  return nullptr;
}

void count_global(const Instruction& instruction) {
  Site& site = *instruction.site;
  const bool writes = site.kind == Kind::kStoreGlobal;
  uintptr_t sectors[kLanes];
  int count = 0;
  for (uint32_t rest = instruction.lanes_of_global; rest != 0; rest &= rest - 1) {
    const uintptr_t address = instruction.global[__builtin_ctz(rest)];
    const uintptr_t sector = address / kSectorBytes;  // accesses are aligned: only one
    Region* region = region_of(address);
    Traffic* traffic = region == nullptr ? nullptr : writes ? &region->written : &region->read;
    if (traffic != nullptr) traffic->bytes += site.bytes;
    site.global_bytes += site.bytes;
    // The last one first: lanes side by side mostly share a sector.
    bool seen = false;
    for (int i = count - 1; i >= 0 && !seen; --i) seen = sectors[i] == sector;
    if (seen) continue;
    sectors[count++] = sector;
    if (traffic != nullptr) ++traffic->times[sector - region->begin / kSectorBytes];
  }
  site.sectors += count;
}

void count_shared(const Instruction& instruction) {
  Site& site = *instruction.site;
  const int lanes_a_phase = site.bytes <= 4 ? kLanes : site.bytes == 8 ? kLanes / 2 : kLanes / 4;
  const uint32_t words_a_lane = std::max(1u, static_cast<uint32_t>(site.bytes) / kBankBytes);
  for (int first = 0; first < kLanes; first += lanes_a_phase) {
    uint32_t words[kBanks][kLanes];
    int in_bank[kBanks] = {};
    int most = 0;
    for (int lane = first; lane < first + lanes_a_phase; ++lane) {
      if ((instruction.lanes_of_shared >> lane & 1) == 0) continue;
      for (uint32_t i = 0; i < words_a_lane; ++i) {
        const uint32_t word = instruction.shared[lane] / kBankBytes + i;
        const uint32_t bank = word % kBanks;
        int& count = in_bank[bank];
        if (std::find(words[bank], words[bank] + count, word) != words[bank] + count) continue;
        words[bank][count++] = word;
        most = std::max(most, count);
      }
    }
    site.wavefronts += most;
    site.ideal_wavefronts += most > 0 ? 1 : 0;
  }
}

Instruction& instruction_of(Site& site, std::vector<Site*>& sites) {
  if (site.seen_at != counters.meeting) {
    site.seen_at = counters.meeting;
    site.instructions_seen.clear();
    sites.push_back(&site);
  }
  if (site.lane_seen_at != counters.lane) {
    site.lane_seen_at = counters.lane;
    site.next = 0;
  }
  const size_t k = site.next++;
  if (k == site.instructions_seen.size()) {
    site.instructions_seen.push_back(static_cast<int>(counters.instructions.size()));
    counters.instructions.emplace_back().site = &site;
  }
  return counters.instructions[static_cast<size_t>(site.instructions_seen[k])];
}

// {"name": value, ...}, a list of what `write` writes, and the like, without a JSON library.
class Json {
 public:
  Json& begin(const char* bracket) {
    text_ << (comma_ ? ", " : "") << bracket;
    comma_ = false;
    return *this;
  }
  Json& end(const char* bracket) {
    text_ << bracket;
    comma_ = true;
    return *this;
  }
  Json& key(const std::string& name) {
    begin("");
    quote(name);
    text_ << ": ";
    return *this;
  }
  Json& value(int64_t number) {
    begin("");
    text_ << number;
    comma_ = true;
    return *this;
  }
  Json& value(const std::string& string) {
    begin("");
    quote(string);
    comma_ = true;
    return *this;
  }
  template <class T>
  Json& field(const std::string& name, const T& of) {
    return key(name).value(of);
  }
  std::string text() const { return text_.str(); }

 private:
  void quote(const std::string& string) {
    text_ << '"';
    for (const char c : string) {
      if (c == '"' || c == '\\') text_ << '\\';
      text_ << c;
    }
    text_ << '"';
  }

  std::ostringstream text_;
  bool comma_ = false;
};

void write_traffic(Json& json, const char* name, const Traffic& traffic) {
  int64_t sectors = 0;
  for (const uint32_t times : traffic.times) sectors += times;
  const auto [least, most] = std::minmax_element(traffic.times.begin(), traffic.times.end());
  json.key(name).begin("{");
  json.field("bytes", traffic.bytes).field("sectors", sectors);
  json.field("least", int64_t{traffic.times.empty() ? 0 : *least});
  json.field("most", int64_t{traffic.times.empty() ? 0 : *most});
  json.end("}");
}

void write_sum(Json& json, const char* name, std::initializer_list<Kind> kinds) {
  Site sum{};
  for (const Site* site : all_sites()) {
    if (std::find(kinds.begin(), kinds.end(), site->kind) == kinds.end()) continue;
    sum.instructions += site->instructions;
    sum.global_bytes += site->global_bytes;
    sum.sectors += site->sectors;
    sum.wavefronts += site->wavefronts;
    sum.ideal_wavefronts += site->ideal_wavefronts;
  }
  json.key(name).begin("{").field("instructions", sum.instructions);
  const Kind kind = *kinds.begin();
  if (kind <= Kind::kCopyAsync16) {
    json.field("bytes", sum.global_bytes).field("sectors", sum.sectors);
  }
  if (kind >= Kind::kCopyAsync16) {
    json.field("wavefronts", sum.wavefronts).field("ideal_wavefronts", sum.ideal_wavefronts);
  }
  json.end("}");
}

}  // namespace

void count_accesses(WarpAccesses& accesses) {
  static std::vector<Site*> sites;
  ++counters.meeting;
  counters.instructions.clear();
  sites.clear();
  for (int lane = 0; lane < kLanes; ++lane) {
    ++counters.lane;
    for (const Access& access : accesses[static_cast<size_t>(lane)]) {
      Instruction& instruction = instruction_of(*access.site, sites);
      if (access.global != nullptr) {
        instruction.lanes_of_global |= uint32_t{1} << lane;
        instruction.global[lane] = reinterpret_cast<uintptr_t>(access.global);
      }
      if (access.shared != kNoShared) {
        instruction.lanes_of_shared |= uint32_t{1} << lane;
        instruction.shared[lane] = access.shared;
      }
    }
    accesses[static_cast<size_t>(lane)].clear();
  }
  for (const Instruction& instruction : counters.instructions) {
    ++instruction.site->instructions;
    if (instruction.lanes_of_global != 0) count_global(instruction);
    if (instruction.lanes_of_shared != 0) count_shared(instruction);
  }
}

void register_region(const char* name, const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  Region region{name, address, address + bytes, {}, {}};
  const size_t sectors =
      bytes == 0 ? 0 : (region.end - 1) / kSectorBytes - address / kSectorBytes + 1;
  region.read.times.resize(sectors);
  region.written.times.resize(sectors);
  counters.regions.push_back(std::move(region));
}

bool in_a_region(const void* address, size_t bytes) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Region* region = region_of(at);
  return region != nullptr && at + bytes <= region->end;
}

void reset_counters() {
  counters.totals = {};
  counters.regions.clear();
  for (Site* site : all_sites()) {
    site->passes = site->instructions = 0;
    site->global_bytes = site->sectors = 0;
    site->wavefronts = site->ideal_wavefronts = 0;
  }
}

Totals& totals() { return counters.totals; }

std::string counters_json() {
  Json json;
  const Totals& totals = counters.totals;
  json.begin("{");
  json.field("launches", totals.launches).field("blocks", totals.blocks);
  json.field("switches", totals.switches).field("mma", totals.mma);
  json.field("sync_warp", totals.sync_warp).field("sync_threads", totals.sync_threads);
  json.field("atomic_add", totals.atomic_add);
  write_sum(json, "global_load", {Kind::kLoadGlobal, Kind::kLoadGlobalWritten});
  write_sum(json, "global_store", {Kind::kStoreGlobal});
  write_sum(json, "copy_async", {Kind::kCopyAsync16});
  write_sum(json, "shared_load", {Kind::kLoadShared});
  write_sum(json, "shared_store", {Kind::kStoreShared});
  write_sum(json, "ldmatrix", {Kind::kLdmatrix});
  json.key("sites").begin("[");
  for (const Site* site : all_sites()) {
    if (site->instructions == 0) continue;
    json.begin("{");
    json.field("kind", std::string(name_of(site->kind))).field("file", site->file);
    json.field("line", int64_t{site->line}).field("lane_bytes", int64_t{site->bytes});
    json.field("instructions", site->instructions);
    json.field("bytes", site->global_bytes).field("sectors", site->sectors);
    json.field("wavefronts", site->wavefronts);
    json.field("ideal_wavefronts", site->ideal_wavefronts);
    json.end("}");
  }
  json.end("]").key("regions").begin("{");
  for (const Region& region : counters.regions) {
    json.key(region.name).begin("{");
    json.field("bytes", static_cast<int64_t>(region.end - region.begin));
    write_traffic(json, "read", region.read);
    write_traffic(json, "written", region.written);
    json.end("}");
  }
  return json.end("}").end("}").text();
}

std::string sites_json() {
  Json json;
  json.begin("{");
  for (int kind = 0; kind < kKinds; ++kind) {
    json.key(name_of(static_cast<Kind>(kind))).begin("[");
    for (const Site* site : all_sites()) {
      if (site->kind != static_cast<Kind>(kind) || site->passes == 0) continue;
      json.begin("{").field("file", site->file).field("line", int64_t{site->line});
      json.field("passes", site->passes).field("disabled", int64_t{site->disabled});
      json.end("}");
    }
    json.end("]");
  }
  return json.end("}").text();
}

}  // namespace qkernels::emulator
