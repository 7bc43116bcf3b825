// 256-bit vectors for dot_kernel.h: a chunk is two halves of 64 columns. `Multiply` adds products
// of u8 and s8, four neighbours each, to int32 lanes.
#pragma once

#include "backends/cpu/dot_kernel.h"

namespace et_moe::cpu {
namespace {

template <class Multiply>
struct Isa256 {
  static constexpr int kRows = 2, kTokens = 2;

  struct Lanes {
    __m256 half[2];
  };
  struct Nibbles {
    __m256i low[2], high[2];
  };

  static Nibbles unpack(const uint8_t* packed) {
    const __m256i mask = _mm256_set1_epi8(0xF);
    Nibbles nibbles;
    for (int h = 0; h < 2; ++h) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed) + h);
      nibbles.low[h] = _mm256_and_si256(bytes, mask);
      nibbles.high[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    }
    return nibbles;
  }

  template <ScaleType kType, int kGroup>
  static Lanes scales(const uint16_t* bits) {
    if constexpr (kGroup == 128) {
      const __m256 all = _mm256_set1_ps(scale_value<kType>(bits));
      return {{all, all}};
    } else if constexpr (kGroup == 64) {
      return {
          {_mm256_set1_ps(scale_value<kType>(bits)), _mm256_set1_ps(scale_value<kType>(bits + 1))}};
    } else {
      const __m256 four = _mm256_castps128_ps256(scale_values<kType, 4>(bits));
      return {{_mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
               _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))}};
    }
  }

  static void accumulate(Lanes& lanes, const Nibbles& w, const Int8Chunk& x, const Lanes& scales) {
    for (int h = 0; h < 2; ++h) {
      const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.even) + h);
      const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.odd) + h);
      const __m256i bias = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.bias) + h);
      const __m256 total = _mm256_cvtepi32_ps(Multiply::add(bias, w.low[h], even, w.high[h], odd));
      const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(x.scale + 8 * h), scales.half[h]);
      lanes.half[h] = _mm256_fmadd_ps(total, scale, lanes.half[h]);
    }
  }

  static float sum(const Lanes& lanes) { return sum8(_mm256_add_ps(lanes.half[0], lanes.half[1])); }
};

}  // namespace
}  // namespace et_moe::cpu
