#include "cpu/linear.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "cpu/faults.h"
#include "cpu/scratch.h"

namespace qkernels::cpu {

namespace {

// Rows that are worked on at a time, which bounds the memory that a thread keeps.
constexpr int64_t kRowsAtOnce = 64, kTileRowsAtOnce = 512;
constexpr int64_t kScaledRowsAtOnce = 11 * kProductPanel;
// Of x, next to what else lies in the L2 cache.
constexpr int64_t kCachedBytes = 3 << 19;
// Starting threads takes as long as so many products.
constexpr int64_t kProductsWorthThreads = 1 << 17;
constexpr int64_t kElementsWorthThreads = 1 << 16;
// Panels from which on threads find enough to do without a split of K.
constexpr int64_t kPanelsWithoutSplit = 32;
constexpr int64_t kColumnsOfPart = 1024;
constexpr int64_t kTasksOfThread = 4;
constexpr int64_t kTileRows = 16;
// Panels of a task: on rows, a multiple of four; on tiles; on vectors of bf16.
constexpr int64_t kRowPanels = 4, kMostRowPanels = 64, kMostTilePanels = 16, kMostScaledPanels = 24;

// Of the thread that calls: x in the order of the kernels, shared by all threads of the call.
thread_local Scratch shared_scratch;
// Of each thread at work: for one thing at a time, and for the int8 row that is made meanwhile.
thread_local Scratch own_scratch, row_scratch;

Pool pool_for(const Pool& pool, int64_t work, int64_t worth) {
  return {work < worth ? 1 : pool.threads, pool.run};
}

// Carves arrays out of one buffer, each at a multiple of 64 bytes. The first pass only adds up.
class Carver {
 public:
  explicit Carver(void* memory) : at_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(at_);
    const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    at_ = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(at_) + static_cast<uintptr_t>(bytes));
    return out;
  }
  size_t used() const { return reinterpret_cast<uintptr_t>(at_); }

 private:
  char* at_;
};

// `layout(carver)` twice: to know the size, and to place the arrays.
template <class Layout>
void carve(Scratch& scratch, const Layout& layout) {
  Carver size(nullptr);
  layout(size);
  Carver placed(scratch.reserve(size.used()));
  layout(placed);
}

// Panels of a task, so that all threads find work: a multiple of those that a kernel takes at once.
int64_t panels_of_task(int64_t panels, const Pool& pool, int64_t at_once, int64_t most) {
  const int64_t tasks = kTasksOfThread * pool.threads;
  return std::clamp(panels / tasks / at_once, int64_t{1}, most / at_once) * at_once;
}

template <class Body>
void for_panels(const Pool& pool, int64_t panels, int64_t at_once, int64_t most, const Body& body) {
  const int64_t step = panels_of_task(panels, pool, at_once, most);
  parallel_for(pool, ceil_div(panels, step),
               [&](int64_t task) { body(task * step, std::min(panels, (task + 1) * step)); });
}

// Parts that K falls into, each of whole groups: a function of the shape alone, since it decides
// in which order sums are added.
int64_t parts_of_k(const Weight& weight) {
  if (weight.panels() >= kPanelsWithoutSplit) return 1;
  const int64_t wanted = ceil_div(kPanelsWithoutSplit, std::max<int64_t>(weight.panels(), 1));
  return std::max<int64_t>(1,
                           std::min({wanted, weight.groups(), weight.columns() / kColumnsOfPart}));
}

Output rows_from(const Output& out, int64_t n, int64_t row) {
  Output moved = out;
  if (out.y != nullptr) moved.y = static_cast<char*>(out.y) + row * n * size_of(out.y_type);
  if (out.int8.values != nullptr && !QK_FAULT(int8_of_first_rows)) {
    moved.int8.values = out.int8.values + row * n;
    moved.int8.row_scales = out.int8.row_scales + row;
  }
  if (out.row_scales != nullptr) moved.row_scales = out.row_scales + row;
  if (QK_FAULT(row_scales_of_first_rows)) moved.row_scales = out.row_scales;
  return moved;
}

// Says of each of `m` rows what int8 numbers of y are multiples of, before any is written.
void tell_scale(const Output& out, int64_t m) {
  if (out.int8.values != nullptr) std::fill_n(out.int8.row_scales, m, out.int8.scale);
}

const void* row_at(const void* x, FloatType type, int64_t stride, int64_t row) {
  return static_cast<const char*>(x) + row * stride * size_of(type);
}

// Runs `rows` and, where K is split, `finish`.
template <class Sum, class Job>
void run_rows(const Job& job, void (*rows)(const Job&, int64_t, int64_t, GroupRange),
              void (*finish)(const Job&, int64_t, int64_t, const Sum*, int), int64_t parts,
              Sum* sums, const Pool& pool) {
  const Weight& weight = job.weight;
  const int64_t panels = weight.panels(), groups = weight.groups();
  if (parts == 1) {
    for_panels(pool, panels, kRowPanels, kMostRowPanels,
               [&](int64_t begin, int64_t end) { rows(job, begin, end, {0, groups, nullptr}); });
    return;
  }
  const int64_t step = panels_of_task(panels * parts, pool, kRowPanels, kMostRowPanels);
  const int64_t ranges = ceil_div(panels, step), part_size = job.m * panels * kLanes;
  parallel_for(pool, ranges * parts, [&](int64_t task) {
    const int64_t part = task / ranges, begin = task % ranges * step;
    const GroupRange range{groups * part / parts, groups * (part + 1) / parts,
                           sums + part * part_size};
    if (QK_FAULT(part_of_k_missing) && part == 1) return;
    rows(job, begin, std::min(panels, begin + step), range);
  });
  if (QK_FAULT(last_part_of_k_not_added)) --parts;
  finish(job, 0, panels, sums, static_cast<int>(parts));
}

void float_on_rows(const FloatArguments& arguments, bool pairs, const Kernels& table,
                   const Pool& pool) {
  const Weight& weight = arguments.weight;
  const int64_t columns = weight.columns(), groups = weight.groups(), parts = parts_of_k(weight);
  for (int64_t row = 0; row < arguments.m; row += kRowsAtOnce) {
    const int64_t m = std::min(kRowsAtOnce, arguments.m - row);
    float *x, *x_sums, *sums;
    int32_t* x_pairs;
    carve(shared_scratch, [&](Carver& carver) {
      x = carver.take<float>(m * columns);
      x_pairs = carver.take<int32_t>(pairs ? m * columns / 2 : 0);
      x_sums = carver.take<float>(weight.has_zeros() ? m * groups : 0);
      sums = carver.take<float>(parts == 1 ? 0 : parts * m * weight.panels() * kLanes);
    });
    parallel_for(pool_for(pool, m * columns, kElementsWorthThreads), m, [&](int64_t r) {
      table.widen_row(row_at(arguments.x, arguments.x_type, arguments.x_stride, row + r),
                      arguments.x_type, weight, arguments.k, x + r * columns,
                      weight.has_zeros() ? x_sums + r * groups : nullptr);
      if (pairs) table.pair_row(x + r * columns, columns, x_pairs + r * columns / 2);
    });
    const void* factors = x;
    if (pairs) factors = x_pairs;
    const FloatJob job{weight, m, factors, x_sums, rows_from(arguments.out, weight.n, row)};
    const auto rows = pairs ? table.float_pairs : table.float_rows;
    run_rows<float, FloatJob>(job, rows, table.finish_float, parts, sums,
                              pool_for(pool, m * weight.n * columns, kProductsWorthThreads));
  }
}

// Numbers of bf16 that hold one of the type.
int terms_of(FloatType type) {
  if (QK_FAULT(tile_second_term_of_fp16_missing) && type == FloatType::kFp16) return 1;
  return type == FloatType::kBf16 ? 1 : type == FloatType::kFp16 ? 2 : 3;
}

void float_on_tiles(const FloatArguments& arguments, bool rounds_weights, const Kernels& table,
                    const Pool& pool) {
  const Weight& weight = arguments.weight;
  const int64_t columns = weight.columns(), groups = weight.groups();
  const int terms = terms_of(arguments.x_type);
  const bool wants_sums = !rounds_weights && weight.has_zeros();
  int64_t at_once = kTileRowsAtOnce;
  if (!rounds_weights) {
    const int64_t cached = kCachedBytes / (columns * terms * 2) / kTileRows * kTileRows;
    at_once = std::clamp(cached, 2 * kTileRows, kTileRowsAtOnce);
  }
  for (int64_t row = 0; row < arguments.m; row += at_once) {
    const int64_t m = std::min(at_once, arguments.m - row);
    const int64_t tiles = ceil_div(m, kTileRows), tile = kTileRows * columns * terms;
    uint16_t* x;
    float* x_sums;
    carve(shared_scratch, [&](Carver& carver) {
      x = carver.take<uint16_t>(tiles * tile);
      x_sums = carver.take<float>(wants_sums ? m * groups : 0);
    });
    const void* first = row_at(arguments.x, arguments.x_type, arguments.x_stride, row);
    parallel_for(pool_for(pool, m * columns, kElementsWorthThreads), tiles, [&](int64_t t) {
      table.pack_float_tile(first, arguments.x_type, arguments.x_stride, t * kTileRows, m,
                            arguments.k, weight, terms, rounds_weights, x + t * tile);
      if (!wants_sums) return;
      auto* wide = static_cast<float*>(own_scratch.reserve(static_cast<size_t>(columns) * 4));
      for (int64_t r = t * kTileRows; r < std::min(m, (t + 1) * kTileRows); ++r) {
        table.widen_row(row_at(first, arguments.x_type, arguments.x_stride, r), arguments.x_type,
                        weight, arguments.k, wide, x_sums + r * groups);
      }
    });
    const FloatTileJob job{weight,
                           m,
                           x,
                           terms,
                           terms_of(arguments.out.y_type),
                           rounds_weights,
                           x_sums,
                           rows_from(arguments.out, weight.n, row)};
    for_panels(pool_for(pool, m * weight.n * columns, kProductsWorthThreads), weight.panels(),
               table.tile_panels, kMostTilePanels, [&](int64_t begin, int64_t end) {
                 const auto bytes = static_cast<size_t>(table.tile_scratch(m, end - begin));
                 table.float_tiles(job, begin, end, own_scratch.reserve(bytes));
               });
  }
}

void float_on_scaled_panels(const FloatArguments& arguments, const Kernels& table,
                            const Pool& pool) {
  const Weight& weight = arguments.weight;
  const int64_t columns = weight.columns(), panels = weight.panels();
  for (int64_t row = 0; row < arguments.m; row += kScaledRowsAtOnce) {
    const int64_t m = std::min(kScaledRowsAtOnce, arguments.m - row);
    const int64_t row_panels = ceil_div(m, kProductPanel);
    uint32_t* x;
    carve(shared_scratch, [&](Carver& carver) {
      x = carver.take<uint32_t>(row_panels * kProductPanel * columns / 2);
    });
    const auto* first = static_cast<const uint16_t*>(
        row_at(arguments.x, arguments.x_type, arguments.x_stride, row));
    parallel_for(pool_for(pool, m * columns, kElementsWorthThreads), row_panels, [&](int64_t r) {
      const int64_t begin = r * kProductPanel, rows = std::min(kProductPanel, m - begin);
      const uint16_t* from = first + begin * arguments.x_stride;
      for (int64_t c = 0; c < columns; c += kScaledChunk) {
        const int64_t width = std::min(kScaledChunk, columns - c);
        uint32_t* to = x + (c * row_panels + r * width) / 2 * kProductPanel;
        table.pack_pairs(from + c, arguments.x_stride, rows, arguments.k - c, width, to);
      }
    });
    const ScaledJob job{weight, m, x, rows_from(arguments.out, weight.n, row)};
    const Pool workers = pool_for(pool, m * weight.n * columns, kProductsWorthThreads);
    for_panels(workers, panels, kScaledPanels, kMostScaledPanels, [&](int64_t begin, int64_t end) {
      const auto bytes = static_cast<size_t>(table.scaled_scratch(m));
      table.scaled_panels(job, begin, end, own_scratch.reserve(bytes));
    });
  }
}

float* values_of_row(const Kernels& table, const RowSource& source, int64_t row) {
  const auto bytes = static_cast<size_t>(ceil_div(source.k, kLanes) * kLanes * 4);
  auto* values = static_cast<float*>(own_scratch.reserve(bytes));
  table.load_row(source, row, values);
  return values;
}

// max|x| / 127 of the whole tensor; NaN or infinity where an element is.
float scale_of_tensor(const RowSource& source, int64_t m, const Kernels& table, const Pool& pool) {
  std::atomic<int32_t> largest{0};
  parallel_for(pool, m, [&](int64_t row) {
    if (QK_FAULT(tensor_scale_of_first_row) && row > 0) return;
    const int32_t bits = table.largest_bits(values_of_row(table, source, row), source.k);
    int32_t seen = largest.load();
    while (bits > seen && !largest.compare_exchange_weak(seen, bits)) {
    }
  });
  const int32_t bits = largest.load();
  float top;
  std::memcpy(&top, &bits, 4);
  return top == 0 ? 1.0f : top / 127.0f;
}

// How the rows of a call are quantized.
struct Scaling {
  const float* given;  // the scale of all rows, or null
  // Whether that is of this very tensor: it then knows of NaN and infinity itself.
  bool of_tensor;

  // Row `row` of a source to int8 [k]; returns its scale.
  float row(const Kernels& table, const RowSource& source, int64_t row, int8_t* out) const {
    const float* values = values_of_row(table, source, row);
    const float scale = table.quantize_row(values, source.k, given, out);
    return of_tensor ? *given : scale;
  }
};

}  // namespace

void Int8Output::limit(int32_t least) {
  // Multiples of the scale, which are rounded, are still nearest to their own numbers.
  reciprocal = 1.0f / scale;
  low = scale * static_cast<float>(least - zero);
  high = scale * static_cast<float>(127 - zero);
  if (relu && !QK_FAULT(relu_missing)) low = std::max(low, 0.0f);
  if (QK_FAULT(zero_of_output_missing)) zero = 0;
}

bool has_float_tiles(Isa isa) { return kernels(isa).float_tiles != nullptr; }

bool has_int8_tiles(Isa isa) { return kernels(isa).int8_tiles != nullptr; }

bool has_pairs(Isa isa) { return kernels(isa).float_pairs != nullptr; }

bool rounds_on_vectors(Isa isa) { return kernels(isa).scaled_panels != nullptr; }

void linear_float(const FloatArguments& arguments, const Schedule& schedule, const Pool& pool) {
  const Kernels& table = kernels(schedule.isa);
  tell_scale(arguments.out, arguments.m);
  if (!schedule.tiles && schedule.rounds_weights) {
    assert(arguments.x_type == FloatType::kBf16);
    return float_on_scaled_panels(arguments, table, pool);
  }
  assert(!schedule.pairs || arguments.x_type == FloatType::kBf16);
  if (!schedule.tiles) return float_on_rows(arguments, schedule.pairs, table, pool);
  assert(schedule.rounds_weights || arguments.weight.groups() == 1 ||
         fits_float_tiles(arguments.weight.group));
  assert(!schedule.rounds_weights || arguments.x_type == FloatType::kBf16);
  float_on_tiles(arguments, schedule.rounds_weights, table, pool);
}

void linear_int8(const Int8Arguments& arguments, const Schedule& schedule, const Pool& pool) {
  const Kernels& table = kernels(schedule.isa);
  const Weight& weight = arguments.weight;
  const int64_t columns = weight.columns(), groups = weight.groups();
  const bool tiles = schedule.tiles;
  assert(!tiles || weight.sums_are_integers() || fits_int8_tiles(schedule.isa, weight.group));
  tell_scale(arguments.out, arguments.m);
  const int64_t at_once = tiles ? kTileRowsAtOnce : kRowsAtOnce;
  const int64_t parts = tiles || !weight.sums_are_integers() ? 1 : parts_of_k(weight);
  const bool quantized = arguments.quantized != nullptr;
  float tensor_scale = 0;
  Scaling scaling{arguments.given_scale, false};
  if (!quantized && arguments.scale_of == ScaleOf::kTensor) {
    const Pool all = pool_for(pool, arguments.m * columns, kElementsWorthThreads);
    tensor_scale = scale_of_tensor(arguments.source, arguments.m, table, all);
    scaling = {&tensor_scale, true};
  }
  for (int64_t row = 0; row < arguments.m; row += at_once) {
    const int64_t m = std::min(at_once, arguments.m - row);
    const int64_t rows = tiles ? ceil_div(m, kTileRows) * kTileRows : m;
    int8_t* x;
    int32_t *x_sums, *sums;
    float* scales;
    carve(shared_scratch, [&](Carver& carver) {
      x = carver.take<int8_t>(rows * columns);
      x_sums = carver.take<int32_t>(rows * groups);
      scales = carver.take<float>(m);
      sums = carver.take<int32_t>(parts == 1 ? 0 : parts * m * weight.panels() * kLanes);
    });
    const Pool some = pool_for(pool, m * columns, kElementsWorthThreads);
    Output out = rows_from(arguments.out, weight.n, row);
    if (!quantized) out.row_scales = scales;
    parallel_for(some, rows, [&](int64_t r) {
      // Tiles want each row in pieces; it is made in one first.
      int8_t* to = x + r * columns;
      if (tiles) to = static_cast<int8_t*>(row_scratch.reserve(static_cast<size_t>(columns)));
      const int64_t k = r < m ? arguments.k : 0;
      if (r < m && quantized) {
        const int8_t* from = arguments.quantized + (row + r) * arguments.quantized_stride;
        std::memcpy(to, from, static_cast<size_t>(k));
      } else if (r < m) {
        scales[r] = scaling.row(table, arguments.source, row + r, to);
      }
      std::memset(to + k, 0, static_cast<size_t>(columns - k));
      if (QK_FAULT(padding_of_int8_x_not_zeroed)) std::memset(to + k, 1, columns - k);
      table.int8_sums(to, weight, x_sums + r * groups);
      if (tiles) {
        int8_t* tile = x + r / kTileRows * kTileRows * columns;
        table.pack_int8_row(to, columns, r % kTileRows, tile);
      }
    });
    const Pool workers = pool_for(pool, m * weight.n * columns, kProductsWorthThreads);
    if (tiles) {
      const Int8TileJob job{weight, m, x, x_sums, out};
      for_panels(workers, weight.panels(), table.tile_panels, kMostTilePanels,
                 [&](int64_t begin, int64_t end) {
                   const auto bytes = static_cast<size_t>(table.tile_scratch(m, end - begin));
                   table.int8_tiles(job, begin, end, own_scratch.reserve(bytes));
                 });
    } else {
      const Int8Job job{weight, m, x, x_sums, out};
      run_rows<int32_t, Int8Job>(job, table.int8_rows, table.finish_int8, parts, sums, workers);
    }
  }
}

void quantize_rows(const RowSource& source, int64_t m, ScaleOf scale_of, const float* given_scale,
                   int8_t* out, float* scales, int32_t* zeros, Isa isa, const Pool& pool) {
  const Kernels& table = kernels(isa);
  const Pool workers = pool_for(pool, m * source.k, kElementsWorthThreads);
  if (zeros != nullptr) {
    parallel_for(workers, m, [&](int64_t row) {
      const float* values = values_of_row(table, source, row);
      scales[row] =
          table.quantize_row_asymmetric(values, source.k, out + row * source.k, zeros + row);
    });
    return;
  }
  float tensor_scale = 0;
  if (scale_of == ScaleOf::kTensor) {
    tensor_scale = scale_of_tensor(source, m, table, workers);
    given_scale = &tensor_scale;
  }
  const Scaling scaling{given_scale, scale_of == ScaleOf::kTensor};
  parallel_for(workers, m, [&](int64_t row) {
    scales[row] = scaling.row(table, source, row, out + row * source.k);
  });
}

}  // namespace qkernels::cpu
