// Compiled for AVX-512 (F, BW, VL) and AVX512-VNNI.
#include "backends/cpu/dot_kernel.h"

namespace et_moe::cpu {
namespace {

struct Avx512Vnni {
  static constexpr int kRows = 4, kTokens = 4;

  struct Lanes {
    __m512 all;
  };
  struct Nibbles {
    __m512i low, high;
  };

  static Nibbles unpack(const uint8_t* packed) {
    const __m512i mask = _mm512_set1_epi8(0xF);
    const __m512i bytes = _mm512_loadu_si512(packed);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  }

  template <ScaleType kType, int kGroup>
  static Lanes scales(const uint16_t* bits) {
    if constexpr (kGroup == 128) {
      return {_mm512_set1_ps(scale_value<kType>(bits))};
    } else {
      constexpr int kEach = kGroup / 8;
      const __m512i group = _mm512_setr_epi32(
          0, 1 / kEach, 2 / kEach, 3 / kEach, 4 / kEach, 5 / kEach, 6 / kEach, 7 / kEach, 8 / kEach,
          9 / kEach, 10 / kEach, 11 / kEach, 12 / kEach, 13 / kEach, 14 / kEach, 15 / kEach);
      const __m128 values = scale_values<kType, kChunk / kGroup>(bits);
      return {_mm512_permutexvar_ps(group, _mm512_castps128_ps512(values))};
    }
  }

  static void accumulate(Lanes& lanes, const Nibbles& w, const Int8Chunk& x, const Lanes& scales) {
    __m512i total = _mm512_loadu_si512(x.bias);
    total = _mm512_dpbusd_epi32(total, w.low, _mm512_loadu_si512(x.even));
    total = _mm512_dpbusd_epi32(total, w.high, _mm512_loadu_si512(x.odd));
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(x.scale), scales.all);
    lanes.all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, lanes.all);
  }

  static float sum(const Lanes& lanes) {
    const __m512i raw = _mm512_castps_si512(lanes.all);
    const __m256 low = _mm256_castsi256_ps(_mm512_castsi512_si256(raw));
    const __m256 high = _mm256_castsi256_ps(_mm512_extracti64x4_epi64(raw, 1));
    return sum8(_mm256_add_ps(low, high));
  }
};

}  // namespace

void dot_avx512vnni(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                    int64_t tokens, float* out, int64_t stride) {
  dot<Avx512Vnni>(weights, rows, x, tokens, out, stride);
}

}  // namespace et_moe::cpu
