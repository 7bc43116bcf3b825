// 256-bit vectors for dot_kernel.h: a chunk is two halves of 64 columns. `Multiply` adds products
// of weights and activations, four neighbours each, to int32 lanes: add() of unpacked nibbles, with
// the bias, and add_int8() of signed weights.
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
  struct Bytes {
    __m256i first[2], second[2];
  };

  static Bytes unpack(const uint8_t* packed) {
    const __m256i mask = _mm256_set1_epi8(0xF);
    Bytes nibbles;
    for (int h = 0; h < 2; ++h) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed) + h);
      nibbles.first[h] = _mm256_and_si256(bytes, mask);
      nibbles.second[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    }
    return nibbles;
  }

  static Bytes load(const int8_t* values) {
    const auto* source = reinterpret_cast<const __m256i*>(values);
    Bytes bytes;
    for (int h = 0; h < 2; ++h) {
      const __m256i a = _mm256_loadu_si256(source + 2 * h);
      const __m256i b = _mm256_loadu_si256(source + 2 * h + 1);
      bytes.first[h] = _mm256_permute2x128_si256(a, b, 0x20);
      bytes.second[h] = _mm256_permute2x128_si256(a, b, 0x31);
    }
    return bytes;
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

  template <bool kInt8>
  static void accumulate(Lanes& lanes, const Bytes& w, const Int8Chunk& x, const Lanes& scales) {
    constexpr auto kAdd = kInt8 ? Multiply::add_int8 : Multiply::add;
    for (int h = 0; h < 2; ++h) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.first) + h);
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.second) + h);
      const __m256i bias = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.bias) + h);
      const __m256 total = _mm256_cvtepi32_ps(kAdd(bias, w.first[h], first, w.second[h], second));
      const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(x.scale + 8 * h), scales.half[h]);
      lanes.half[h] = _mm256_fmadd_ps(total, scale, lanes.half[h]);
    }
  }

  static float sum(const Lanes& lanes) { return sum8(_mm256_add_ps(lanes.half[0], lanes.half[1])); }
};

}  // namespace
}  // namespace et_moe::cpu
