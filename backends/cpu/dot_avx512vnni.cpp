// Compiled for AVX-512 (F, BW, VL) and AVX512-VNNI.
#include "backends/cpu/dot_kernel.h"

namespace et_moe::cpu {
namespace {

struct Avx512Vnni {
  static constexpr int kRows = 4, kTokens = 4;

  struct Lanes {
    __m512 all;
  };
  struct Bytes {
    __m512i first, second;
  };

  static Bytes unpack(const uint8_t* packed) {
    const __m512i mask = _mm512_set1_epi8(0xF);
    const __m512i bytes = _mm512_loadu_si512(packed);
    return {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask)};
  }

  // Flipping the sign bit adds 128.
  static Bytes load(const int8_t* values) {
    const __m512i sign = _mm512_set1_epi8(-128);
    const __m512i a = _mm512_loadu_si512(values), b = _mm512_loadu_si512(values + 64);
    return {_mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0x88), sign),
            _mm512_xor_si512(_mm512_shuffle_i64x2(a, b, 0xDD), sign)};
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

  template <bool kInt8>
  static void accumulate(Lanes& lanes, const Bytes& w, const Int8Chunk& x, const Lanes& scales) {
    __m512i total = _mm512_loadu_si512(x.bias);
    total = _mm512_dpbusd_epi32(total, w.first, _mm512_loadu_si512(x.first));
    total = _mm512_dpbusd_epi32(total, w.second, _mm512_loadu_si512(x.second));
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

const DotFunctions dot_avx512vnni = kDotFunctions<Avx512Vnni>;

}  // namespace et_moe::cpu
