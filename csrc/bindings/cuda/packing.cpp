// The operators that pack weights into the fragment layouts on their device, and unpack them.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings/cuda/device.h"
#include "bindings/cuda/fragment.h"
#include "cuda/weights/fragment.cuh"
#include "cuda/weights/pack.h"

namespace qkernels::bindings {

namespace {

void check_bits(int64_t bits) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, got ",
          bits);
}

void check_int8_bits(int64_t bits) {
  require(bits == 4 || bits == 8, "bits must be 4 or 8, got ", bits);
}

// Of a weight [n, k] whose rows from first_row on are packed; but for its source.
PackArguments pack_arguments(const at::Tensor& words, int64_t n, int64_t k, int64_t first_row,
                             int64_t rows, int64_t bits) {
  check_words(words, n, k, static_cast<int>(bits));
  require(first_row >= 0 && first_row % kRowMultiple == 0 && rows >= 0 && rows <= n - first_row &&
              (rows == n - first_row || rows % kRowMultiple == 0),
          rows, " rows from ", first_row, " on, of ", n, ", do not begin and end at a multiple of ",
          kRowMultiple);
  PackArguments arguments{};
  arguments.words = words.mutable_data_ptr();
  arguments.n = n;
  arguments.k = k;
  arguments.first_row = first_row;
  arguments.rows = rows;
  arguments.bits = static_cast<int>(bits);
  return arguments;
}

void take_codes(PackArguments& arguments, const at::Tensor& codes, const at::Tensor& words) {
  arguments.kind = CodeSource::kCodes;
  check("codes", codes, words.device(), {arguments.rows, arguments.k});
  require(codes.scalar_type() == at::kByte, "codes must be uint8, got ", codes.scalar_type());
}

// Packs rows [first_row, first_row + rows) of an [n, k] weight into `words`, from `source` as
// `kind` says: "codes" (uint8 [rows, k]), "awq" or "gptq" (the int32 words of the whole weight).
void pack_op(const at::Tensor& source, const Optional& perm, at::Tensor words, int64_t n, int64_t k,
             int64_t first_row, int64_t rows, int64_t bits, std::string_view kind) {
  check_bits(bits);
  PackArguments arguments = pack_arguments(words, n, k, first_row, rows, bits);
  if (kind == "codes") {
    take_codes(arguments, source, words);
  } else {
    require(kind == "awq" || kind == "gptq", "kind must be codes, awq or gptq, got ", kind);
    require(source.scalar_type() == at::kInt, kind, " words must be int32, got ",
            source.scalar_type());
    if (kind == "awq") {
      arguments.kind = CodeSource::kAwq;
      require(bits == 4 && n % 8 == 0, "awq words hold 4 bits and N a multiple of 8, got ", bits,
              " bits and N = ", n);
      check("awq words", source, words.device(), {k, n / 8});
    } else {
      arguments.kind = CodeSource::kGptq;
      require(k * bits % 32 == 0, "gptq words hold a whole number of K, got ", k);
      check("gptq words", source, words.device(), {k * bits / 32, n});
    }
  }
  if (perm) {
    check("perm", *perm, words.device(), {k});
    require(perm->scalar_type() == at::kInt, "perm must be int32, got ", perm->scalar_type());
  }
  const DeviceScope scope(words);
  arguments.source = source.const_data_ptr();
  arguments.perm = perm ? perm->const_data_ptr<int32_t>() : nullptr;
  succeed(pack_fragment(arguments, scope.stream()));
}

// Packs uint8 codes [rows, k] into rows [first_row, first_row + rows) of fragment_int8 words.
void pack_int8_op(const at::Tensor& codes, at::Tensor words, int64_t n, int64_t k,
                  int64_t first_row, int64_t rows, int64_t bits) {
  check_int8_bits(bits);
  PackArguments arguments = pack_arguments(words, n, k, first_row, rows, bits);
  take_codes(arguments, codes, words);
  const DeviceScope scope(words);
  arguments.source = codes.const_data_ptr();
  succeed(pack_fragment_int8(arguments, scope.stream()));
}

using Unpack = decltype(&unpack_fragment);

at::Tensor unpacked(Unpack unpack, const at::Tensor& words, int64_t n, int64_t k, int64_t first_row,
                    int64_t rows, int64_t bits) {
  check_words(words, n, k, static_cast<int>(bits));
  require(first_row >= 0 && rows >= 0 && rows <= n - first_row, rows, " rows from ", first_row,
          " on are not in 0 to ", n);
  const DeviceScope scope(words);
  at::Tensor codes = at::empty({rows, k}, words.options().dtype(at::kByte));
  succeed(unpack(words.const_data_ptr(), codes.mutable_data_ptr<uint8_t>(), k, first_row, rows,
                 static_cast<int>(bits), scope.stream()));
  return codes;
}

at::Tensor unpack_op(const at::Tensor& words, int64_t n, int64_t k, int64_t first_row, int64_t rows,
                     int64_t bits) {
  check_bits(bits);
  return unpacked(&unpack_fragment, words, n, k, first_row, rows, bits);
}

at::Tensor unpack_int8_op(const at::Tensor& words, int64_t n, int64_t k, int64_t first_row,
                          int64_t rows, int64_t bits) {
  check_int8_bits(bits);
  return unpacked(&unpack_fragment_int8, words, n, k, first_row, rows, bits);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(QKERNELS_LIBRARY, m) {
  m.def(
      "pack_fragment(Tensor source, Tensor? perm, Tensor(a!) words, int n, int k, int first_row, "
      "int rows, int bits, str kind) -> ()");
  m.def("unpack_fragment(Tensor words, int n, int k, int first_row, int rows, int bits) -> Tensor");
  m.def(
      "pack_fragment_int8(Tensor codes, Tensor(a!) words, int n, int k, int first_row, int rows, "
      "int bits) -> ()");
  m.def(
      "unpack_fragment_int8(Tensor words, int n, int k, int first_row, int rows, int bits) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(QKERNELS_LIBRARY, QKERNELS_DISPATCH_KEY, m) {
  m.impl("pack_fragment", &pack_op);
  m.impl("unpack_fragment", &unpack_op);
  m.impl("pack_fragment_int8", &pack_int8_op);
  m.impl("unpack_fragment_int8", &unpack_int8_op);
}

}  // namespace qkernels::bindings
