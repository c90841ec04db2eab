// Each decoder on its own: loads the words of a lane, decodes them, and stores the pairs. What it
// takes more than nothing_kernel, which loads and stores as much, is the decoder's.

#include "cuda/launch.cuh"
#include "cuda/weights/decode.cuh"
#include "cuda/weights/fragment.cuh"

namespace qkernels {

struct ProbeParameters {
  const uint4* words;
  const float* table;
  uint4* pairs;
  Offsets offsets;
};

// 16 bytes of codes are 32 weights of 4 bits or 16 of 8 bits, in steps of 8. Of 2 and 3 bits, two
// words of low bits and one of third ones are 32.
template <class D>
constexpr int kSteps = D::kBits == 8 ? 2 : 4;

template <class D>
__global__ void decode_kernel(ProbeParameters p) {
  const int i = threadIdx.x;
  D decoder;
  decoder.start(p.table);
  const uint4 held = p.words[i];
  const uint32_t words[4] = {held.x, held.y, held.z, held.w};
#pragma unroll
  for (int step = 0; step < kSteps<D>; ++step) {
    uint32_t pairs[4];
    if constexpr (kLiesInSpans<D::kBits>) {
      uint32_t of_step[2];
      span_words(words[step / 2], words[2], step, of_step);
      decoder.decode(of_step, p.offsets, pairs);
    } else {
      decoder.decode(words + step * D::kWords, p.offsets, pairs);
    }
    p.pairs[i * kSteps<D> + step] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// Stores as often, with nothing decoded; a table is loaded where the decoder has one.
template <class D>
__global__ void nothing_kernel(ProbeParameters p) {
  const int i = threadIdx.x;
  D decoder;
  decoder.start(p.table);
  const uint4 held = p.words[i];
#pragma unroll
  for (int step = 0; step < kSteps<D>; ++step) {
    uint4 out = held;
    if constexpr (sizeof(D) > sizeof(int)) {
      out = step % 2 == 0 ? uint4{decoder.low_bytes[0], decoder.low_bytes[1], decoder.low_bytes[2],
                                  decoder.low_bytes[3]}
                          : uint4{decoder.high_bytes[0], decoder.high_bytes[1],
                                  decoder.high_bytes[2], decoder.high_bytes[3]};
      out.x += held.x;
    }
    p.pairs[i * kSteps<D> + step] = out;
  }
}

template <template <class> class Decoder, bool kRealZeros>
const char* run(DecoderTag<Decoder, kRealZeros>, const ProbeParameters& p) {
  for (const auto kernel : {decode_kernel<Decoder<Half>>, decode_kernel<Decoder<Bfloat16>>,
                            nothing_kernel<Decoder<Half>>, nothing_kernel<Decoder<Bfloat16>>}) {
    if (const char* problem = launch(kernel, dim3(1), 32, 0, nullptr, p)) return problem;
  }
  return nullptr;
}

// Nobody calls it: it instantiates the kernels for every decoder.
const char* probe(const FragmentWeight& weight, const ProbeParameters& p) {
  return visit_decoder(weight, [&](auto decoder) { return run(decoder, p); });
}

}  // namespace qkernels
