// A block a row: read, normalized or gated in fp32, and quantized to 8 bits.
//
// A thread takes pieces of eight numbers, 16 bytes of a 16-bit type. What it has read of its pieces
// it keeps in shared memory as fp32, in two planes, so that neither side conflicts; nobody else
// reads it, so only the reductions over the row meet. Pieces that do not fit are read again.
//
//     shared memory:  slots of the reductions | [2 halves of pieces][held] 16 bytes

#include <algorithm>

#include "cuda/activations/pieces.cuh"
#include "cuda/activations/quantize_rows.h"
#include "integers.h"

namespace qkernels {

namespace {

// Reductions: a sum, one of squares, and the largest numbers of both signs.
constexpr int kSlotBytes = 256;
static_assert(kSlotBytes >= 4 * kReductionBytes);
constexpr int kHeldBytes = 32;  // of a piece

struct RowParameters {
  RowsIn x, other;    // `other` of nothing begins at null
  RowsIn gain, bias;  // one row, or null
  FloatType gain_type, bias_type;
  const float* given_scale;
  const int32_t* given_zero;
  const unsigned char* left_out;  // of each piece a bit for each number, or null
  unsigned char* codes;
  int64_t codes_stride;
  float* scales;
  int32_t* zeros;
  unsigned char *total, *rounded;
  int64_t k;
  int pieces;
  int held;  // pieces in shared memory
  bool whole;
  bool fills;  // rows of codes up to codes_stride
  float epsilon;
  float largest;  // of kInt8
};

// The largest numbers of a row, by their bits: of either sign, or positive and negative ones apart.
template <bool kApart>
struct Tops {
  uint32_t words[kApart ? 2 : 1];

  QK_DEVICE void start() {
    words[0] = 0;
    if constexpr (kApart) words[1] = 0;
  }

  QK_DEVICE void take(float value) {
    if constexpr (kApart) {
      const uint32_t bits = ptx::as_bits(value);
      const bool negative = bits >> 31 != 0;
      words[0] = Largest()(words[0], negative ? 0 : bits);
      words[1] = Largest()(words[1], negative ? bits & 0x7fffffff : 0);
    } else {
      words[0] = Largest()(words[0], magnitude_bits(value));
    }
  }

  QK_DEVICE uint32_t of_both() const {
    if constexpr (kApart) return Largest()(words[0], words[1]);
    return words[0];
  }
};

// How a row's numbers become codes.
template <RowCode kCode>
class Coder {
 public:
  static constexpr bool kHasZero = kCode == RowCode::kInt8WithZero;

  // largest: number of symmetric codes.
  QK_DEVICE void start(const Tops<kHasZero>& tops, const float* given, const int32_t* given_zero,
                       float largest) {
    largest_ = largest;
    const bool finite = tops.of_both() < kInfinityBits;
    if (given != nullptr) {
      scale_ = ptx::as_float(ptx::load_global<uint32_t>(given));
      quotient_.start(scale_, false);
      // A given scale knows nothing of this row, so NaN and infinity are told here.
      if (!finite) scale_ = ptx::as_float(kNan);
      if constexpr (kHasZero) zero_ = ptx::load_global<int32_t>(given_zero);
      return;
    }
    if constexpr (kHasZero) {
      const float low = -ptx::as_float(tops.words[1]), high = ptx::as_float(tops.words[0]);
      scale_ = high == low ? 1.0f : ptx::divide(ptx::add(high, -low), 255.0f);
      if (!finite) scale_ = ptx::as_float(kNan);
      quotient_.start(scale_, finite);
      // NaN, of a scale that is NaN or of 0 over 0, gives 0.
      const float shifted = ptx::add(-128.0f, -rounded(ptx::divide(low, scale_)));
      zero_ = shifted == shifted ? to_integer(ptx::max(ptx::min(shifted, 127.0f), -128.0f)) : 0;
    } else {
      scale_ = scale_of(tops.of_both(), largest);
      quotient_.start(scale_, finite);
    }
  }

  QK_DEVICE float scale() const { return scale_; }
  QK_DEVICE int zero() const { return zero_; }

  // In the lowest byte; the others are of no meaning.
  QK_DEVICE uint32_t operator()(float value) const {
    float ratio = quotient_(value);
    if constexpr (kCode == RowCode::kFp8E4M3) {
      // The sign of the value: a quotient has lost that of -0.
      return to_fp8_e4m3(ratio) | (ptx::as_bits(value) >> 24 & 0x80);
    } else if constexpr (kHasZero) {
      if (!quotient_.bounded()) ratio = limited(ratio, 512.0f);
      // Rounded before the zero point is added: half to even of the value itself.
      const int moved = to_integer(ratio) + zero_;
      return static_cast<uint32_t>(moved > 127 ? 127 : moved < -128 ? -128 : moved);
    } else {
      if (!quotient_.bounded()) ratio = limited(ratio, largest_);
      return static_cast<uint32_t>(to_integer(ratio));
    }
  }

 private:
  static constexpr uint32_t kNan = 0x7fc00000;

  // NaN is 0.
  static QK_DEVICE float limited(float x, float largest) {
    return x == x ? ptx::max(ptx::min(x, largest), -largest) : 0.0f;
  }

  static QK_DEVICE float rounded(float x) { return ptx::add(ptx::add(x, kRounder), -kRounder); }

  Quotient quotient_;
  float scale_, largest_;
  int zero_ = 0;
};

template <RowKind kKind>
constexpr bool kIsNorm = is_norm(kKind);
template <RowKind kKind>
constexpr bool kIsGate = is_gate(kKind);

template <class T, RowKind kKind, RowCode kCode>
class RowBlock {
 public:
  QK_DEVICE RowBlock(const RowParameters& parameters, ptx::Shared shared)
      : p_(parameters), shared_(shared), row_(blockIdx.x) {
    x_ = p_.x.first + row_ * p_.x.stride;
    other_ = p_.other.first + row_ * p_.other.stride;
  }

  QK_DEVICE void run() {
    Tops<Coder<kCode>::kHasZero> tops;
    tops.start();
    uint32_t sums[1] = {0}, squares[1] = {0};
    for_pieces([&](int index) {
      Piece piece = read(index);
      if (index < p_.held) hold(index, piece);
      if constexpr (kIsNorm<kKind>) {
        if (p_.total != nullptr) store(p_.total, index, piece);
      }
      if constexpr (kKind == RowKind::kLayerNorm) {
        float sum = ptx::as_float(sums[0]);
#pragma unroll
        for (int i = 0; i < kPieceNumbers; ++i) sum = ptx::add(sum, piece.values[i]);
        sums[0] = ptx::as_bits(sum);
      } else if constexpr (kKind == RowKind::kRmsNorm) {
        add_squares(squares, piece);
      } else {
        take(tops, piece);
      }
    });
    const auto k = static_cast<float>(p_.k);
    if constexpr (kKind == RowKind::kLayerNorm) {
      reduce(sums, shared_, Sum());
      mean_ = ptx::divide(ptx::as_float(sums[0]), k);
      for_pieces([&](int index) { add_squares(squares, centered(index)); });
    }
    if constexpr (kIsNorm<kKind>) {
      reduce(squares, shared_ + kReductionBytes, Sum());
      const float mean_square = ptx::divide(ptx::as_float(squares[0]), k);
      factor_ = ptx::divide(1.0f, ptx::sqrt(ptx::add(mean_square, p_.epsilon)));
      for_pieces([&](int index) { take(tops, final_piece(index)); });
    }
    reduce(tops.words, shared_ + 2 * kReductionBytes, Largest());
    Coder<kCode> coder;
    coder.start(tops, p_.given_scale, p_.given_zero, p_.largest);
    for_pieces([&](int index) {
      Piece piece = final_piece(index);
      if constexpr (kKind != RowKind::kPlain) {
        if (p_.rounded != nullptr) store(p_.rounded, index, piece);
      }
      store_codes(index, piece, coder);
    });
    if (threadIdx.x != 0) return;
    ptx::store_global<float>(p_.scales + row_, coder.scale());
    if constexpr (Coder<kCode>::kHasZero) {
      ptx::store_global<int32_t>(p_.zeros + row_, coder.zero());
    }
  }

 private:
  template <class Function>
  QK_DEVICE void for_pieces(Function function) {
#pragma unroll 1
    for (int index = threadIdx.x; index < p_.pieces; index += blockDim.x) function(index);
  }

  static QK_DEVICE int64_t column_of(int index) {
    return static_cast<int64_t>(index) * kPieceNumbers;
  }

  static QK_DEVICE void take(Tops<Coder<kCode>::kHasZero>& tops, const Piece& piece) {
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) tops.take(piece.values[i]);
  }

  static QK_DEVICE void add_squares(uint32_t (&squares)[1], const Piece& piece) {
    float sum = ptx::as_float(squares[0]);
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) sum = ptx::fma(piece.values[i], piece.values[i], sum);
    squares[0] = ptx::as_bits(sum);
  }

  static QK_DEVICE float gate(float x) {
    if constexpr (kKind == RowKind::kGeluMul) return gelu(x);
    if constexpr (kKind == RowKind::kGeluTanhMul) return gelu_tanh(x);
    return silu(x);
  }

  // From global memory: x, x + residual as rounded, or the product with the gate.
  QK_DEVICE Piece read(int index) {
    const int64_t column = column_of(index);
    Piece piece;
    piece.load<T>(x_, p_.x.aligned, column, p_.k);
    if constexpr (kIsNorm<kKind>) {
      if (p_.total != nullptr) {
        Piece residual;
        residual.load<T>(other_, p_.other.aligned, column, p_.k);
#pragma unroll
        for (int i = 0; i < kPieceNumbers; ++i) {
          piece.values[i] = ptx::add(piece.values[i], residual.values[i]);
        }
        if constexpr (kNumberBytes<T> == 2) piece.round<T>();
      }
    } else if constexpr (kIsGate<kKind>) {
      Piece up;
      up.load<T>(other_, p_.other.aligned, column, p_.k);
#pragma unroll
      for (int i = 0; i < kPieceNumbers; ++i) {
        piece.values[i] = ptx::mul(gate(piece.values[i]), up.values[i]);
      }
      round_if_asked(piece);
    } else if constexpr (kCode == RowCode::kInt8) {
      if (p_.left_out != nullptr) {
        const uint32_t left_out = ptx::load_global<uint8_t>(p_.left_out + index);
#pragma unroll
        for (int i = 0; i < kPieceNumbers; ++i) {
          if ((left_out >> i & 1) != 0) piece.values[i] = 0.0f;
        }
      }
    }
    return piece;
  }

  QK_DEVICE ptx::Shared held_at(int index, int half) const {
    return shared_ + (kSlotBytes + (half * p_.held + index) * 16);
  }

  QK_DEVICE void hold(int index, const Piece& piece) {
    ptx::store_shared<uint4>(held_at(index, 0), piece.half(0));
    ptx::store_shared<uint4>(held_at(index, 1), piece.half(1));
  }

  // Into rows [m][k].
  QK_DEVICE void store(unsigned char* rows, int index, Piece& piece) {
    unsigned char* row = rows + row_ * p_.k * kNumberBytes<T>;
    piece.store_rounded<T>(row, p_.whole, column_of(index), p_.k);
  }

  QK_DEVICE void round_if_asked(Piece& piece) {
    if constexpr (kNumberBytes<T> == 2) {
      if (p_.rounded != nullptr) piece.round<T>();
    }
  }

  // What `read` has given.
  QK_DEVICE Piece kept(int index) {
    Piece piece;
    if (index < p_.held) {
      piece.set_half(0, ptx::load_shared<uint4>(held_at(index, 0)));
      piece.set_half(1, ptx::load_shared<uint4>(held_at(index, 1)));
    } else {
      piece = read(index);
    }
    return piece;
  }

  // Without the mean of the row, and zeros behind it.
  QK_DEVICE Piece centered(int index) {
    Piece piece = kept(index);
    const int64_t left = p_.k - column_of(index);
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) {
      piece.values[i] = i < left ? ptx::add(piece.values[i], -mean_) : 0.0f;
    }
    return piece;
  }

  // What is quantized.
  QK_DEVICE Piece final_piece(int index) {
    Piece piece;
    if constexpr (kKind == RowKind::kLayerNorm) {
      piece = centered(index);
    } else {
      piece = kept(index);
    }
    if constexpr (kIsNorm<kKind>) {
      const int64_t column = column_of(index);
#pragma unroll
      for (int i = 0; i < kPieceNumbers; ++i) {
        piece.values[i] = ptx::mul(piece.values[i], factor_);
      }
      if (p_.gain.first != nullptr) {
        const Piece gain = load_vector(p_.gain, p_.gain_type, column);
#pragma unroll
        for (int i = 0; i < kPieceNumbers; ++i) {
          piece.values[i] = ptx::mul(piece.values[i], gain.values[i]);
        }
      }
      if constexpr (kKind == RowKind::kLayerNorm) {
        if (p_.bias.first != nullptr) {
          const Piece bias = load_vector(p_.bias, p_.bias_type, column);
#pragma unroll
          for (int i = 0; i < kPieceNumbers; ++i) {
            piece.values[i] = ptx::add(piece.values[i], bias.values[i]);
          }
        }
      }
      round_if_asked(piece);
    }
    return piece;
  }

  // Of [k] numbers, zero behind them.
  QK_DEVICE Piece load_vector(const RowsIn& from, FloatType type, int64_t column) const {
    Piece piece;
    switch (type) {
      case FloatType::kHalf: piece.load<Half>(from.first, from.aligned, column, p_.k); break;
      case FloatType::kBfloat16:
        piece.load<Bfloat16>(from.first, from.aligned, column, p_.k);
        break;
      case FloatType::kFloat: piece.load<Single>(from.first, from.aligned, column, p_.k); break;
    }
    return piece;
  }

  QK_DEVICE void store_codes(int index, const Piece& piece, const Coder<kCode>& coder) {
    uint32_t codes[kPieceNumbers];
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) codes[i] = coder(piece.values[i]);
    const int64_t column = column_of(index);
    unsigned char* to = p_.codes + row_ * p_.codes_stride + column;
    if (p_.whole || p_.fills) {
      if constexpr (Coder<kCode>::kHasZero) {  // others give 0 for the zeros behind the row
#pragma unroll
        for (int i = 0; i < kPieceNumbers; ++i) {
          if (column + i >= p_.k) codes[i] = 0;
        }
      }
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t* four = codes + 4 * i;
        words[i] = ptx::prmt(ptx::prmt(four[0], four[1], 0x0040),
                             ptx::prmt(four[2], four[3], 0x0040), 0x5410);
      }
      ptx::store_global<uint2>(to, uint2{words[0], words[1]});
      if (p_.fills && index == p_.pieces - 1 && index % 2 == 0) {
        ptx::store_global<uint2>(to + kPieceNumbers, uint2{0, 0});
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kPieceNumbers; ++i) {
      if (!ptx::within(column + i, p_.k)) continue;
      ptx::store_global<uint8_t>(to + i, static_cast<uint8_t>(codes[i] & 0xff));
    }
  }

  const RowParameters& p_;
  const ptx::Shared shared_;
  const int64_t row_;
  const unsigned char *x_, *other_;
  float mean_ = 0.0f, factor_ = 1.0f;
};

template <class T, RowKind kKind, RowCode kCode>
QK_KERNEL void QK_LAUNCH_BOUNDS(kMostRowThreads, 2)
    quantize_rows_kernel(const QK_GRID_CONSTANT RowParameters parameters) {
  ptx::start_next_kernel();
  ptx::wait_for_kernels_before();
  RowBlock<T, kKind, kCode>(parameters, ptx::shared_memory()).run();
}

struct TensorScaleParameters {
  RowsIn x;
  int64_t m, k;
  int pieces;
  float largest;
  float* scale;
  uint32_t* tops;
  uint32_t* counter;
};

// Every block finds the largest magnitude of its rows, and the last one to get here that of all.
template <class T>
QK_KERNEL void QK_LAUNCH_BOUNDS(kMostRowThreads, 2)
    tensor_scale_kernel(const QK_GRID_CONSTANT TensorScaleParameters p) {
  // Slots of two reductions, and whether this block is the last.
  const ptx::Shared shared = ptx::shared_memory();
  const ptx::Shared arrived = shared + 2 * kReductionBytes;
  uint32_t top[1] = {0};
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < p.m; row += gridDim.x) {
#pragma unroll 1
    for (int index = threadIdx.x; index < p.pieces; index += blockDim.x) {
      Piece piece;
      piece.load<T>(p.x.first + row * p.x.stride, p.x.aligned,
                    static_cast<int64_t>(index) * kPieceNumbers, p.k);
#pragma unroll
      for (int i = 0; i < kPieceNumbers; ++i) {
        top[0] = Largest()(top[0], magnitude_bits(piece.values[i]));
      }
    }
  }
  reduce(top, shared, Largest());
  if (threadIdx.x == 0) {
    ptx::store_global<uint32_t>(p.tops + blockIdx.x, top[0]);
    ptx::store_shared<uint32_t>(arrived, ptx::count_block(p.counter));
  }
  ptx::sync_threads();
  if (ptx::load_shared<uint32_t>(arrived) != gridDim.x - 1) return;
  if (threadIdx.x == 0) ptx::store_global<uint32_t>(p.counter, 0);
#pragma unroll 1
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    top[0] = Largest()(top[0], ptx::load_global_written<uint32_t>(p.tops + block));
  }
  reduce(top, shared + kReductionBytes, Largest());
  if (threadIdx.x == 0) ptx::store_global<float>(p.scale, scale_of(top[0], p.largest));
}

// A piece a thread, in whole warps.
int threads_for(int64_t pieces) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(pieces, 32) * 32, 32, kMostRowThreads));
}

template <class T, RowKind kKind, RowCode kCode>
const char* start(const RowParameters& p, int64_t m, Stream stream) {
  dim3 grid;
  grid.x = static_cast<unsigned>(m);
  return launch_early(quantize_rows_kernel<T, kKind, kCode>, grid, threads_for(p.pieces),
                      kSlotBytes + p.held * kHeldBytes, stream, p);
}

template <class T, RowKind kKind>
const char* start(const RowParameters& p, const RowArguments& arguments, Stream stream) {
  switch (arguments.code) {
    case RowCode::kInt8: return start<T, kKind, RowCode::kInt8>(p, arguments.m, stream);
    case RowCode::kInt8WithZero:
      return start<T, kKind, RowCode::kInt8WithZero>(p, arguments.m, stream);
    case RowCode::kFp8E4M3:
      if constexpr (kKind == RowKind::kPlain) {
        return start<T, kKind, RowCode::kFp8E4M3>(p, arguments.m, stream);
      }
  }
  return "fp8 is for plain rows";
}

template <class T>
const char* start(const RowParameters& p, const RowArguments& arguments, Stream stream) {
  switch (arguments.kind) {
    case RowKind::kPlain: return start<T, RowKind::kPlain>(p, arguments, stream);
    case RowKind::kRmsNorm: return start<T, RowKind::kRmsNorm>(p, arguments, stream);
    case RowKind::kSiluMul: return start<T, RowKind::kSiluMul>(p, arguments, stream);
    case RowKind::kLayerNorm: return start<T, RowKind::kLayerNorm>(p, arguments, stream);
    case RowKind::kGeluMul: return start<T, RowKind::kGeluMul>(p, arguments, stream);
    case RowKind::kGeluTanhMul: return start<T, RowKind::kGeluTanhMul>(p, arguments, stream);
  }
  return "no such kind of rows";
}

template <class Visitor>
const char* visit_type(FloatType type, Visitor visitor) {
  switch (type) {
    case FloatType::kHalf: return visitor(Half());
    case FloatType::kBfloat16: return visitor(Bfloat16());
    case FloatType::kFloat: return visitor(Single());
  }
  return "no such type of rows";
}

}  // namespace

const char* quantize_rows(const RowArguments& arguments, Stream stream) {
  const int64_t m = arguments.m, k = arguments.k;
  if (m == 0) return nullptr;
  RowParameters p{};
  p.x = rows_in(arguments.x, arguments.x_stride, m, arguments.type);
  p.other = rows_in(arguments.other, arguments.other_stride, m, arguments.type);
  p.gain = rows_in(arguments.gain, 0, 1, arguments.gain_type);
  p.gain_type = arguments.gain_type;
  p.bias = rows_in(arguments.bias, 0, 1, arguments.bias_type);
  p.bias_type = arguments.bias_type;
  p.given_scale = arguments.given_scale;
  p.given_zero = arguments.given_zero;
  p.codes_stride = arguments.codes_stride;
  p.fills = arguments.codes_stride % 16 == 0 && arguments.codes_stride != k;
  p.left_out = arguments.left_out;
  p.codes = static_cast<unsigned char*>(arguments.codes);
  p.scales = arguments.scales;
  p.zeros = arguments.zeros;
  p.total = static_cast<unsigned char*>(arguments.total);
  p.rounded = static_cast<unsigned char*>(arguments.rounded);
  p.k = k;
  p.pieces = static_cast<int>(ceil_div(k, kPieceNumbers));
  p.held = std::clamp((arguments.shared_bytes - kSlotBytes) / kHeldBytes, 0, p.pieces);
  p.whole = k % kPieceNumbers == 0;
  p.epsilon = arguments.epsilon;
  p.largest = arguments.code == RowCode::kFp8E4M3 ? 448.0f : arguments.largest;
  return visit_type(arguments.type,
                    [&](auto type) { return start<decltype(type)>(p, arguments, stream); });
}

const char* tensor_scale(const TensorScaleArguments& arguments, Stream stream) {
  TensorScaleParameters p{};
  p.x = rows_in(arguments.x, arguments.x_stride, arguments.m, arguments.type);
  p.m = arguments.m;
  p.k = arguments.k;
  p.pieces = static_cast<int>(ceil_div(arguments.k, kPieceNumbers));
  p.largest = arguments.largest;
  p.scale = arguments.scale;
  p.tops = arguments.tops;
  p.counter = arguments.counter;
  dim3 grid;
  grid.x = static_cast<unsigned>(arguments.blocks);
  return visit_type(arguments.type, [&](auto type) {
    return launch(tensor_scale_kernel<decltype(type)>, grid, threads_for(p.pieces),
                  3 * kReductionBytes, stream, p);
  });
}

}  // namespace qkernels
