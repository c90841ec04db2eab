// The table of a vector type. Included last, after QK_TARGET.

#pragma once

#include "cpu/bursts.h"
#include "cpu/column_rounding.h"
#include "cpu/float_rows.h"
#include "cpu/int8_rows.h"
#include "cpu/quantize_rows.h"
#include "cpu/scale_search.h"

namespace qkernels::cpu {

template <class V>
Kernels vector_kernels() {
  Kernels table{};
  table.float_rows = float_rows<V>;
  table.int8_rows = int8_rows<V>;
  table.finish_float = finish_float<V>;
  table.finish_int8 = finish_int8<V>;
  table.widen_row = widen_row<V>;
  table.int8_sums = int8_sums<V>;
  table.load_row = load_row<V>;
  table.quantize_row = quantize_row<V>;
  table.quantize_row_asymmetric = quantize_row_asymmetric<V>;
  table.largest_bits = largest_bits<V>;
  table.search_scales = search_scales<V>;
  table.round_columns = round_columns<V>;
  table.fp32_burst = fp32_burst<V>;
  table.int8_burst = int8_burst<V>;
  table.read_burst = read_burst<V>;
  return table;
}

}  // namespace qkernels::cpu
