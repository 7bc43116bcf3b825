// The register-blocked loop of dot.h, over what an instruction set provides. `Isa` has
//   Lanes: 16 floats; Bytes: a chunk's 128 weights, unpacked;
//   unpack(const uint8_t*) of INT4, load(const int8_t*) of INT8 weights,
//   scales<scale_type, group_size>(const uint16_t*),
//   accumulate<kInt8>(Lanes&, const Bytes&, const Int8Chunk&, const Lanes& scales),
//   sum(const Lanes&);
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

template <class Isa>
struct ScaledChunk {
  typename Isa::Bytes bytes;
  typename Isa::Lanes scales;
};

// How a chunk of INT4 rows comes into registers, for dot_block.
template <class Isa, ScaleType kType, int kGroup>
struct Int4Reader {
  using Set = Isa;
  using Rows = Int4Rows;
  static constexpr bool kInt8 = false;
  static constexpr bool kHasTail = kGroup < kChunk;
  static constexpr int kScales = kChunk / kGroup;

  Int4Reader(const Int4Rows& weights, int64_t row)
      : packed(weights.packed + row * (weights.columns / 2)),
        scale(weights.scale + row * (weights.columns / kGroup)),
        row_bytes(weights.columns / 2),
        row_scales(weights.columns / kGroup) {}

  ScaledChunk<Isa> load(int64_t row, int64_t chunk) const {
    return read(packed + row * row_bytes + chunk * 64, scale + row * row_scales + chunk * kScales);
  }

  ScaledChunk<Isa> load_tail(int64_t row, int64_t chunk, int64_t columns) const {
    uint8_t bytes[64] = {};
    uint16_t bits[4] = {};
    memcpy(bytes, packed + row * row_bytes + chunk * 64, columns / 2);
    memcpy(bits, scale + row * row_scales + chunk * kScales, columns / kGroup * sizeof(uint16_t));
    return read(bytes, bits);
  }

  static ScaledChunk<Isa> read(const uint8_t* bytes, const uint16_t* bits) {
    return {Isa::unpack(bytes), Isa::template scales<kType, kGroup>(bits)};
  }

  const uint8_t* packed;
  const uint16_t* scale;
  int64_t row_bytes, row_scales;
};

// The same for INT8 rows.
template <class Isa>
struct Int8Reader {
  using Set = Isa;
  using Rows = Int8Rows;
  static constexpr bool kInt8 = true;
  static constexpr bool kHasTail = true;

  Int8Reader(const Int8Rows& weights, int64_t row)
      : values(weights.values + row * weights.columns),
        scale(weights.scale + row),
        columns(weights.columns) {}

  ScaledChunk<Isa> load(int64_t row, int64_t chunk) const {
    return read(values + row * columns + chunk * kChunk, row);
  }

  ScaledChunk<Isa> load_tail(int64_t row, int64_t chunk, int64_t count) const {
    int8_t bytes[kChunk] = {};
    memcpy(bytes, values + row * columns + chunk * kChunk, count);
    return read(bytes, row);
  }

  ScaledChunk<Isa> read(const int8_t* bytes, int64_t row) const {
    return {Isa::load(bytes), Isa::template scales<ScaleType::kBFloat16, kChunk>(scale + row)};
  }

  const int8_t* values;
  const uint16_t* scale;
  int64_t columns;
};

template <class Reader, int kRows, int kTokens>
inline void dot_block(const typename Reader::Rows& weights, int64_t row, const Int8Chunk* const* x,
                      float* out, int64_t stride) {
  using Isa = typename Reader::Set;
  const Reader reader(weights, row);
  typename Isa::Lanes lanes[kRows][kTokens] = {};
  const auto add = [&](int r, int64_t c, const ScaledChunk<Isa>& w) {
    for (int t = 0; t < kTokens; ++t) {
      Isa::template accumulate<Reader::kInt8>(lanes[r][t], w.bytes, x[t][c], w.scales);
    }
  };
  const int64_t chunks = weights.columns / kChunk;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int r = 0; r < kRows; ++r) add(r, c, reader.load(r, c));
  }
  if (const int64_t tail = weights.columns % kChunk; Reader::kHasTail && tail > 0) {
    for (int r = 0; r < kRows; ++r) add(r, chunks, reader.load_tail(r, chunks, tail));
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) out[t * stride + r] = Isa::sum(lanes[r][t]);
  }
}

template <class Reader, int kTokens, int kRows>
inline void dot_tokens(const typename Reader::Rows& weights, int64_t rows,
                       const Int8Chunk* const* x, float* out, int64_t stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    dot_block<Reader, kRows, kTokens>(weights, r, x, out + r, stride);
  }
  for (; r < rows; ++r) dot_block<Reader, 1, kTokens>(weights, r, x, out + r, stride);
}

template <class Reader>
inline void dot_with(const typename Reader::Rows& weights, int64_t rows, const Int8Chunk* const* x,
                     int64_t tokens, float* out, int64_t stride) {
  constexpr int kTokens = Reader::Set::kTokens;
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    dot_tokens<Reader, kTokens, Reader::Set::kRows>(weights, rows, x + t, out + t * stride, stride);
  }
  for (; t < tokens; ++t) {
    dot_tokens<Reader, 1, 4>(weights, rows, x + t, out + t * stride, stride);
  }
}

template <class Isa, ScaleType kType>
inline void dot_type(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                     int64_t tokens, float* out, int64_t stride) {
  switch (weights.group_size) {
    case 32:
      return dot_with<Int4Reader<Isa, kType, 32>>(weights, rows, x, tokens, out, stride);
    case 64:
      return dot_with<Int4Reader<Isa, kType, 64>>(weights, rows, x, tokens, out, stride);
    case 128:
      return dot_with<Int4Reader<Isa, kType, 128>>(weights, rows, x, tokens, out, stride);
  }
}

template <class Isa>
inline void dot_int4(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                     int64_t tokens, float* out, int64_t stride) {
  if (weights.scale_type == ScaleType::kFloat16) {
    return dot_type<Isa, ScaleType::kFloat16>(weights, rows, x, tokens, out, stride);
  }
  dot_type<Isa, ScaleType::kBFloat16>(weights, rows, x, tokens, out, stride);
}

template <class Isa>
inline constexpr DotFunctions kDotFunctions = {dot_int4<Isa>, dot_with<Int8Reader<Isa>>};

}  // namespace
}  // namespace et_moe::cpu
