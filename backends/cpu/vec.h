// Eight-lane float vectors in the compilers' portable vector extension (GCC, Clang).
//
// The kernels are compiled without contraction of a * b + c: where a fused multiply-add is meant,
// fma() is called, so a result does not depend on what the compiler chose to fuse.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace et_moe::cpu {

using bf16 = executorch::aten::BFloat16;
using fp16 = executorch::aten::Half;

inline constexpr int kLanes = 8;

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int8_t i8x8 __attribute__((vector_size(8)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Vector>
inline Vector load_vector(const void* source) {
  Vector v;
  std::memcpy(&v, source, sizeof(v));
  return v;
}

inline f32x8 splat(float value) {
  return f32x8{value, value, value, value, value, value, value, value};
}

// Operations for which GCC makes slow code by itself: fused multiply-add, widening, narrowing.
#ifdef __AVX2__
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
inline i32x8 widen(u16x8 v) { return (i32x8)_mm256_cvtepu16_epi32((__m128i)v); }
inline i32x8 widen(u8x8 v) { return (i32x8)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)v)); }
inline i32x8 widen(i8x8 v) { return (i32x8)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)v)); }
inline u16x8 narrow(u32x8 v) {
  const __m256i halves = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (u16x8)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000));
}
#else
inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
inline i32x8 widen(u16x8 v) { return __builtin_convertvector(v, i32x8); }
inline i32x8 widen(u8x8 v) { return __builtin_convertvector(v, i32x8); }
inline i32x8 widen(i8x8 v) { return __builtin_convertvector(v, i32x8); }
inline u16x8 narrow(u32x8 v) { return __builtin_convertvector(v, u16x8); }
#endif

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bits_as<float>(uint32_t{value.x} << 16); }

// Of finite numbers only: scales are.
inline float to_float(fp16 value) {
#ifdef __F16C__
  return _cvtsh_ss(value.x);
#else
  const uint32_t magnitude = value.x & 0x7FFF;
  const float finite = magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f
                                         : bits_as<float>((magnitude << 13) + (112u << 23));
  return value.x & 0x8000 ? -finite : finite;
#endif
}

inline f32x8 load(const float* source) { return load_vector<f32x8>(source); }
inline f32x8 load(const bf16* source) {
  return bits_as<f32x8>(widen(load_vector<u16x8>(source)) << 16);
}
inline f32x8 load(const int8_t* source) {
  return __builtin_convertvector(widen(load_vector<i8x8>(source)), f32x8);
}

// The first `count` (at most 8) lanes; the others are 0.
template <class T>
inline f32x8 load(const T* source, int64_t count) {
  if (count >= kLanes) return load(source);
  T padded[kLanes] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return load(padded);
}

inline void store(float* target, f32x8 v) { std::memcpy(target, &v, sizeof(v)); }
inline void store(bf16* target, f32x8 v) {
  const u32x8 raw = bits_as<u32x8>(v);
  const u32x8 rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16;
  const u32x8 nan = u32x8{} + 0x7FC0;
  const u16x8 half = narrow(v == v ? rounded : nan);
  std::memcpy(target, &half, sizeof(half));
}

template <class T>
inline void store(T* target, f32x8 v, int64_t count) {
  if (count >= kLanes) return store(target, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(target, padded, count * sizeof(T));
}

// Conversions to bfloat16 and back.
inline f32x8 round_to_bf16(f32x8 v) {
  bf16 rounded[kLanes];
  store(rounded, v);
  return load(rounded);
}

inline float sum(f32x8 v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float max(f32x8 v) {
  float result = v[0];
  for (int i = 1; i < kLanes; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

inline f32x8 max(f32x8 a, f32x8 b) { return a > b ? a : b; }

// The largest magnitude. Magnitudes are compared as integers, so that NaN is the largest of all.
inline i32x8 max_magnitude(i32x8 largest, f32x8 v) {
  const i32x8 magnitude = bits_as<i32x8>(v) & 0x7FFFFFFF;
  return magnitude > largest ? magnitude : largest;
}

inline float magnitude(i32x8 largest) {
  int32_t result = largest[0];
  for (int i = 1; i < kLanes; ++i) result = largest[i] > result ? largest[i] : result;
  return bits_as<float>(result);
}

// Adding this constant to |v| < 2^22 rounds v to an integer, which the low bits then hold.
inline constexpr float kRounder = 12582912.0f;

inline i32x8 round_to_int(f32x8 v) {
  return bits_as<i32x8>(v + kRounder) - bits_as<i32x8>(splat(kRounder));
}

// e^v within 2 units in the last place (Cephes' expf polynomial); NaN stays NaN.
inline f32x8 exp(f32x8 v) {
  const f32x8 low = splat(-105.0f), high = splat(89.0f);
  v = v < low ? low : v;
  v = v > high ? high : v;
  const f32x8 n = fma(v, splat(1.44269504088896341f), splat(kRounder)) - kRounder;
  const f32x8 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), v));
  f32x8 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  // 2^n is made of two factors, since n may lie outside the range of one exponent.
  const i32x8 exponent = round_to_int(n);
  const i32x8 half = exponent >> 1;
  return p * bits_as<f32x8>((half + 127) << 23) * bits_as<f32x8>((exponent - half + 127) << 23);
}

inline f32x8 sigmoid(f32x8 v) { return 1.0f / (1.0f + exp(-v)); }
inline f32x8 silu(f32x8 v) { return v / (1.0f + exp(-v)); }

}  // namespace et_moe::cpu
