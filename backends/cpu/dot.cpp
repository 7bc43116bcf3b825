#include "backends/cpu/dot.h"

#include <cmath>

#include "backends/cpu/vec.h"

namespace et_moe::cpu {

namespace {

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
      total += chunk.even[4 * lane + i] * (byte & 0xF) + chunk.odd[4 * lane + i] * (byte >> 4);
    }
    const float weight_scale = to_float(scale[column / weights.group_size]);
    lanes[lane] =
        std::fma(static_cast<float>(total), chunk.scale[lane] * weight_scale, lanes[lane]);
  }
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

}  // namespace

void dot_scalar(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
                float* out, int64_t stride) {
  const auto row = weights.scale_type == ScaleType::kFloat16 ? dot_row<fp16> : dot_row<bf16>;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) out[t * stride + r] = row(weights, r, x[t]);
  }
}

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
  static const DotVariant variants[kDotVariants] = {{"avx512vnni", nullptr, false},
                                                    {"avxvnni", nullptr, false},
                                                    {"avx2", nullptr, false},
                                                    {"scalar", dot_scalar, true}};
#endif
  return variants;
}

DotFunction dot_w4a8() {
  static const DotFunction best = [] {
    const DotVariant* variant = dot_variants();
    while (!variant->supported) ++variant;
    return variant->function;
  }();
  return best;
}

}  // namespace et_moe::cpu
