// The register-blocked loop of dot.h, over what an instruction set provides. `Isa` has
//   Lanes: 16 floats; Nibbles: a chunk's 128 weights, unpacked;
//   unpack(const uint8_t*), scales<scale_type, group_size>(const uint16_t*),
//   accumulate(Lanes&, const Nibbles&, const Int8Chunk&, const Lanes& scales), sum(const Lanes&);
//   kRows x kTokens: how many outputs fit the registers when there are several tokens.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "backends/cpu/dot.h"

namespace et_moe::cpu {
namespace {

// Converts N (at most 4) scales to floats.
template <ScaleType kType, int N>
inline __m128 scale_values(const uint16_t* bits) {
  __m128i raw;
  if constexpr (N == 4) {
    raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bits));
  } else if constexpr (N == 2) {
    int32_t two;
    memcpy(&two, bits, sizeof(two));
    raw = _mm_cvtsi32_si128(two);
  } else {
    raw = _mm_cvtsi32_si128(*bits);
  }
  if constexpr (kType == ScaleType::kFloat16) return _mm_cvtph_ps(raw);
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
}

template <ScaleType kType>
inline float scale_value(const uint16_t* bits) {
  return _mm_cvtss_f32(scale_values<kType, 1>(bits));
}

inline float sum8(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <class Isa, ScaleType kType, int kGroup, int kRows, int kTokens>
inline void dot_block(const Int4Rows& weights, int64_t row, const Int8Chunk* const* x, float* out,
                      int64_t stride) {
  constexpr int kScales = kChunk / kGroup;
  const uint8_t* packed = weights.packed + row * (weights.columns / 2);
  const uint16_t* scale = weights.scale + row * (weights.columns / kGroup);
  const int64_t row_bytes = weights.columns / 2, row_scales = weights.columns / kGroup;
  typename Isa::Lanes lanes[kRows][kTokens] = {};
  const int64_t chunks = weights.columns / kChunk;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int r = 0; r < kRows; ++r) {
      const auto nibbles = Isa::unpack(packed + r * row_bytes + c * 64);
      const auto scales = Isa::template scales<kType, kGroup>(scale + r * row_scales + c * kScales);
      for (int t = 0; t < kTokens; ++t) Isa::accumulate(lanes[r][t], nibbles, x[t][c], scales);
    }
  }
  if (const int64_t tail = weights.columns % kChunk; kGroup < kChunk && tail > 0) {
    for (int r = 0; r < kRows; ++r) {
      uint8_t bytes[64] = {};
      uint16_t bits[4] = {};
      memcpy(bytes, packed + r * row_bytes + chunks * 64, tail / 2);
      memcpy(bits, scale + r * row_scales + chunks * kScales, tail / kGroup * sizeof(uint16_t));
      const auto nibbles = Isa::unpack(bytes);
      const auto scales = Isa::template scales<kType, kGroup>(bits);
      for (int t = 0; t < kTokens; ++t) {
        Isa::accumulate(lanes[r][t], nibbles, x[t][chunks], scales);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) out[t * stride + r] = Isa::sum(lanes[r][t]);
  }
}

template <class Isa, ScaleType kType, int kGroup, int kTokens, int kRows>
inline void dot_tokens(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, float* out,
                       int64_t stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    dot_block<Isa, kType, kGroup, kRows, kTokens>(weights, r, x, out + r, stride);
  }
  for (; r < rows; ++r) dot_block<Isa, kType, kGroup, 1, kTokens>(weights, r, x, out + r, stride);
}

template <class Isa, ScaleType kType, int kGroup>
inline void dot_group(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                      int64_t tokens, float* out, int64_t stride) {
  constexpr int kTokens = Isa::kTokens;
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    dot_tokens<Isa, kType, kGroup, kTokens, Isa::kRows>(weights, rows, x + t, out + t * stride,
                                                        stride);
  }
  for (; t < tokens; ++t) {
    dot_tokens<Isa, kType, kGroup, 1, 4>(weights, rows, x + t, out + t * stride, stride);
  }
}

template <class Isa, ScaleType kType>
inline void dot_type(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                     int64_t tokens, float* out, int64_t stride) {
  switch (weights.group_size) {
    case 32:
      return dot_group<Isa, kType, 32>(weights, rows, x, tokens, out, stride);
    case 64:
      return dot_group<Isa, kType, 64>(weights, rows, x, tokens, out, stride);
    case 128:
      return dot_group<Isa, kType, 128>(weights, rows, x, tokens, out, stride);
  }
}

template <class Isa>
inline void dot(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
                float* out, int64_t stride) {
  if (weights.scale_type == ScaleType::kFloat16) {
    return dot_type<Isa, ScaleType::kFloat16>(weights, rows, x, tokens, out, stride);
  }
  dot_type<Isa, ScaleType::kBFloat16>(weights, rows, x, tokens, out, stride);
}

}  // namespace
}  // namespace et_moe::cpu
