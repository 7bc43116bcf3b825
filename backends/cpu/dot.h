// Products of INT4 weight rows and INT8 activation rows.
//
// Nibbles stay unsigned (value + 8): sum a (w - 8) = sum a w - 8 sum a, and the second sum, which
// depends on the activations only, is the start value of the integer accumulators. That is the
// operand order of x86's u8 x s8 dot products.
//
// All variants compute the same bits. Each output has 16 float accumulators; accumulator l takes,
// for each chunk of 128 columns, the exact integer sum over columns 8l..8l+7 in one fused
// multiply-add with (activation scale * weight scale), and all are added in a fixed tree at the
// end.
//
// This header is included by files compiled for newer instruction sets: it must not pull in inline
// functions that the rest of the program shares.
#pragma once

#include <stdint.h>

namespace et_moe::cpu {

inline constexpr int kChunk = 128;

// 128 INT8 activations in the order of the nibbles of packed weights, with zeros past the row's
// end.
struct Int8Chunk {
  int8_t even[64], odd[64];
  int32_t bias[16];  // -8 * the sum of columns 8l..8l+7
  float scale[16];   // of columns 8l..8l+7
};

enum class ScaleType { kBFloat16, kFloat16 };

// Rows in the INT4 format: `packed` is uint8 [rows, columns / 2], even columns in the low nibble,
// `scale` holds bits of floats [rows, columns / group_size] of the type that `scale_type` names.
// group_size is 32, 64 or 128 and divides columns.
struct Int4Rows {
  const uint8_t* packed;
  const uint16_t* scale;
  int64_t columns;
  int64_t group_size;
  ScaleType scale_type = ScaleType::kBFloat16;
};

// out[t * stride + r] = row r of weights . x[t], for r below rows and t below tokens. x[t] holds
// ceil(columns / 128) chunks.
using DotFunction = void (*)(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                             int64_t tokens, float* out, int64_t stride);

void dot_scalar(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
                float* out, int64_t stride);
#ifdef __x86_64__
void dot_avx2(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
              float* out, int64_t stride);
void dot_avxvnni(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x, int64_t tokens,
                 float* out, int64_t stride);
void dot_avx512vnni(const Int4Rows& weights, int64_t rows, const Int8Chunk* const* x,
                    int64_t tokens, float* out, int64_t stride);
#endif

struct DotVariant {
  const char* name;
  DotFunction function;
  bool supported;  // by this processor
};

inline constexpr int kDotVariants = 4;

// All variants, best first; the last is the scalar one.
const DotVariant* dot_variants();

// The best supported variant.
DotFunction dot_w4a8();

}  // namespace et_moe::cpu
