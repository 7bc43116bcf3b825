#include "backends/cpu/dot.h"

#include <algorithm>
#include <cmath>

#include "backends/cpu/vec.h"

namespace et_moe::cpu {

namespace {

float add_lanes(float (&lanes)[16]) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

template <class Scale>
float dot_row(const Int4Rows& weights, int64_t row, const Int8Chunk* x) {
  const uint8_t* packed = weights.packed + row * (weights.columns / 2);
  const auto* scale =
      reinterpret_cast<const Scale*>(weights.scale) + row * (weights.columns / weights.group_size);
  float lanes[16] = {};
  for (int64_t column = 0; column < weights.columns; column += 8) {
    const Int8Chunk& chunk = x[column / kChunk];
    const int lane = static_cast<int>(column % kChunk) / 8;
    int32_t total = chunk.bias[lane];
    for (int i = 0; i < 4; ++i) {
      const uint8_t byte = packed[column / 2 + i];
      total += chunk.first[4 * lane + i] * (byte & 0xF) + chunk.second[4 * lane + i] * (byte >> 4);
    }
    const float weight_scale = to_float(scale[column / weights.group_size]);
    lanes[lane] =
        std::fma(static_cast<float>(total), chunk.scale[lane] * weight_scale, lanes[lane]);
  }
  return add_lanes(lanes);
}

float dot_row_int8(const Int8Rows& weights, int64_t row, const Int8Chunk* x) {
  const int8_t* values = weights.values + row * weights.columns;
  const float weight_scale = to_float(reinterpret_cast<const bf16*>(weights.scale)[row]);
  float lanes[16] = {};
  for (int64_t begin = 0; begin < weights.columns; begin += kChunk, ++x) {
    int32_t totals[16] = {};
    const int64_t columns = std::min<int64_t>(kChunk, weights.columns - begin);
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = k / 32 * 16 + k % 16;
      totals[at / 4] += values[begin + k] * (k % 32 < 16 ? x->first : x->second)[at];
    }
    for (int l = 0; l < 16; ++l) {
      lanes[l] = std::fma(static_cast<float>(totals[l]), x->scale[l] * weight_scale, lanes[l]);
    }
  }
  return add_lanes(lanes);
}

template <auto kRow, class Rows>
void for_rows(const Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
              float* out, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) out[t * stride + r] = kRow(weights, r, x[t]);
  }
}

void dot_int4(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
              float* out, int64_t stride) {
  const auto run = weights.scale_type == ScaleType::kFloat16 ? for_rows<dot_row<fp16>, Int4Rows>
                                                             : for_rows<dot_row<bf16>, Int4Rows>;
  run(weights, rows, x, tokens, out, stride);
}

}  // namespace

const DotFunctions dot_scalar = {dot_int4, for_rows<dot_row_int8, Int8Rows>};

const DotVariant* dot_variants() {
#ifdef __x86_64__
  static const DotVariant variants[kDotVariants] = {
      {"avx512vnni", dot_avx512vnni,
       __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw")},
      {"avxvnni", dot_avxvnni, __builtin_cpu_supports("avxvnni") != 0},
      {"avx2", dot_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"scalar", dot_scalar, true},
  };
#else
  static const DotVariant variants[kDotVariants] = {{"avx512vnni", {}, false},
                                                    {"avxvnni", {}, false},
                                                    {"avx2", {}, false},
                                                    {"scalar", dot_scalar, true}};
#endif
  return variants;
}

const DotFunctions& best_dot() {
  static const DotFunctions& best = []() -> const DotFunctions& {
    const DotVariant* variant = dot_variants();
    while (!variant->supported) ++variant;
    return variant->functions;
  }();
  return best;
}

}  // namespace et_moe::cpu
