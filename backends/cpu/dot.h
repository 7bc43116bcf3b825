// Products of INT4 or INT8 weight rows and INT8 activation rows.
//
// Weights are taken as unsigned, nibbles as value + 8 and bytes as value + 128, which is the
// operand order of x86's u8 x s8 dot products: sum a (w - 8) = sum a w - 8 sum a. The second sum,
// which depends on the activations only, is the start value of the integer accumulators.
//
// All variants compute the same bits. Each output has 16 float accumulators; accumulator l takes,
// for each chunk of 128 columns, the exact integer sum over eight columns in one fused multiply-add
// with (activation scale * weight scale), and all are added in a fixed tree at the end. The eight
// columns are 8l..8l+7 for INT4 weights. For INT8 weights they are four of the even and four of the
// odd 16 columns of a run of 32, k..k+3 and k+16..k+19 with k = 32(l/4) + 4(l%4). Each time these
// lie together once the weights are in registers, and have one activation scale.
//
// This header is included by files compiled for newer instruction sets: it must not pull in inline
// functions that the rest of the program shares.
#pragma once

#include <stdint.h>

namespace et_moe::cpu {

inline constexpr int kChunk = 128;

// 128 INT8 activations in the order in which weights are unpacked, with zeros past the row's end:
// the even columns and then the odd ones for INT4 weights, every other 16 columns and then those
// between for INT8 weights. Accumulator l takes bytes 4l..4l+3 of both.
struct Int8Chunk {
  int8_t first[64], second[64];
  int32_t bias[16];  // -8 (INT4) or -128 (INT8) * the sum of an accumulator's columns
  float scale[16];   // of an accumulator's columns
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

// Rows in the INT8 format: `values` is [rows, columns], `scale` holds bits of bfloat16 [rows].
struct Int8Rows {
  const int8_t* values;
  const uint16_t* scale;
  int64_t columns;
};

// out[t * stride + r] = row r of weights . x[t], for r below rows and t below tokens. x[t] holds
// ceil(columns / 128) chunks; its values are -127..127 for Int8Rows.
template <class Rows>
using DotFunction = void (*)(const Rows& weights, int64_t rows, const Int8Chunk* const* x,
                             int64_t tokens, float* out, int64_t stride);

struct DotFunctions {
  DotFunction<Int4Rows> int4;
  DotFunction<Int8Rows> int8;
};

extern const DotFunctions dot_scalar;
#ifdef __x86_64__
extern const DotFunctions dot_avx2, dot_avxvnni, dot_avx512vnni;
#endif

struct DotVariant {
  const char* name;
  DotFunctions functions;
  bool supported;  // by this processor
};

inline constexpr int kDotVariants = 4;

// All variants, best first; the last is the scalar one.
const DotVariant* dot_variants();

// Those of the best supported variant.
const DotFunctions& best_dot();

}  // namespace et_moe::cpu
