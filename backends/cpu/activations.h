// Activation rows in the forms that matrix products take: INT8 chunks or padded floats.
#pragma once

#include "backends/cpu/dot.h"
#include "backends/cpu/floats.h"

namespace et_moe::cpu {

// Columns that share an INT8 scale in front of a GEMM over the hidden dimension (ACTIVATION_TILE of
// the op contracts).
inline constexpr int kActivationTile = 128;

// Quantizes columns begin..end, which share a scale, into q[0..end-begin) and returns the scale.
// `source` has f32x8 load(column, count).
template <class Source>
inline float quantize_tile(const Source& source, int64_t begin, int64_t end, int8_t* q) {
  i32x8 largest = {};
  for_lanes(end - begin, [&](int64_t i, int64_t count) {
    largest = max_magnitude(largest, source.load(begin + i, count));
  });
  const float amax = magnitude(largest);
  if (amax < 1e-30f) {
    std::memset(q, 0, end - begin);
    return 0.0f;
  }
  // This is how torch computes 127 / tensor: ties are rounded as in the reference.
  const float inverse = 127.0f * (1.0f / amax);
  for_lanes(end - begin, [&](int64_t i, int64_t count) {
    const i32x8 rounded = round_to_int(source.load(begin + i, count) * inverse);
    const i8x8 narrow = __builtin_convertvector(rounded, i8x8);
    std::memcpy(q + i, &narrow, count);
  });
  return amax / 127.0f;
}

inline int64_t int8_chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

// Quantizes a row in tiles (32, 64 or 128 columns) into int8_chunks(columns) chunks, for products
// with INT4 or INT8 weights.
template <int kTile, bool kForInt4, class Source>
inline void pack_int8(const Source& source, int64_t columns, Int8Chunk* row) {
  static_assert(kChunk % kTile == 0 && kTile % 32 == 0);
  for (int64_t begin = 0; begin < columns; begin += kChunk, ++row) {
    int8_t q[kChunk] = {};
    float scale[16] = {};
    const int64_t end = std::min(columns, begin + kChunk);
    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int64_t tile_end = std::min(end, tile + kTile);
      const float value = quantize_tile(source, tile, tile_end, q + (tile - begin));
      std::fill_n(scale + (tile - begin) / 8, kTile / 8, value);
    }
    for (int i = 0; i < 64; ++i) {
      row->first[i] = q[kForInt4 ? 2 * i : 16 * (i / 16) + i];
      row->second[i] = q[kForInt4 ? 2 * i + 1 : 16 * (i / 16) + i + 16];
    }
    for (int lane = 0; lane < 16; ++lane) {
      int32_t total = 0;
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) total += row->first[i] + row->second[i];
      row->bias[lane] = (kForInt4 ? -8 : -128) * total;
      row->scale[lane] = scale[lane];
    }
  }
}

// How many floats a row of a float product is padded to: the next multiple of 16.
inline int64_t padded_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// Copies a row and pads it with zeros. For INT4 weights every 16 columns are reordered into the 8
// even ones and then the 8 odd ones, which is the order in which nibbles are unpacked.
template <bool kForInt4, class Source>
inline void pack_floats(const Source& source, int64_t columns, float* row) {
  for (int64_t k = 0; k < columns; k += 16) {
    const f32x8 low = source.load(k, std::min<int64_t>(kLanes, columns - k));
    const int64_t rest = columns - k - kLanes;
    const f32x8 high =
        rest > 0 ? source.load(k + kLanes, std::min<int64_t>(kLanes, rest)) : f32x8{};
    if constexpr (kForInt4) {
      store(row + k, __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14));
      store(row + k + kLanes, __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15));
    } else {
      store(row + k, low);
      store(row + k + kLanes, high);
    }
  }
}

}  // namespace et_moe::cpu
