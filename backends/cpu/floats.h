// Floating-point data whose dtype is known at run time only. The dtype is looked at once per
// vector, which is cheap where a kernel streams over data once; inner loops of products are
// templates.
#pragma once

#include <cmath>

#include "backends/cpu/op.h"
#include "backends/cpu/vec.h"

namespace et_moe::cpu {

// Read-only float32 or bfloat16 numbers. Made from an empty optional it has none.
class Floats {
 public:
  explicit Floats(const Tensor& tensor)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        bf16_(tensor.scalar_type() == ScalarType::BFloat16) {}
  explicit Floats(const float* data) : data_(reinterpret_cast<const char*>(data)) {}
  explicit Floats(const OptionalTensor& tensor) {
    if (tensor.has_value()) *this = Floats(*tensor);
  }

  explicit operator bool() const { return data_ != nullptr; }
  bool is_bf16() const { return bf16_; }

  Floats operator+(int64_t offset) const {
    Floats moved = *this;
    moved.data_ += offset * (bf16_ ? sizeof(bf16) : sizeof(float));
    return moved;
  }

  // Loads the `count` (at most 8) numbers from index i on; the other lanes are 0.
  f32x8 load(int64_t i, int64_t count = kLanes) const {
    return bf16_ ? cpu::load(reinterpret_cast<const bf16*>(data_) + i, count)
                 : cpu::load(reinterpret_cast<const float*>(data_) + i, count);
  }

  float operator[](int64_t i) const {
    return bf16_ ? to_float(reinterpret_cast<const bf16*>(data_)[i])
                 : reinterpret_cast<const float*>(data_)[i];
  }

 private:
  const char* data_ = nullptr;
  bool bf16_ = false;
};

// The writable counterpart; stores round to the dtype.
class MutableFloats {
 public:
  explicit MutableFloats(const Tensor& tensor)
      : data_(tensor.mutable_data_ptr()), bf16_(tensor.scalar_type() == ScalarType::BFloat16) {}

  void store(int64_t i, f32x8 v, int64_t count = kLanes) const {
    if (bf16_) {
      cpu::store(static_cast<bf16*>(data_) + i, v, count);
    } else {
      cpu::store(static_cast<float*>(data_) + i, v, count);
    }
  }

  void zero(int64_t begin, int64_t end) const {
    const size_t size = bf16_ ? sizeof(bf16) : sizeof(float);
    std::memset(static_cast<char*>(data_) + begin * size, 0, (end - begin) * size);
  }

 private:
  void* data_;
  bool bf16_;
};

// Calls body(i, count) for each vector of 0..n; `count` is 8 for all but the last one.
template <class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, int64_t{kLanes});
  if (i < n) body(i, n - i);
}

// The sum of squares of n numbers, of which source.load(i, count) gives a vector.
template <class Source>
inline float sum_of_squares(const Source& source, int64_t n) {
  f32x8 total = {};
  for_lanes(n, [&](int64_t i, int64_t count) {
    const f32x8 v = source.load(i, count);
    total = fma(v, v, total);
  });
  return sum(total);
}

// One row of x as a layer sees it: x * rsqrt(mean(x^2) + eps) * (1 + weight), rounded to x's dtype,
// or x itself if there is no weight.
class NormedRow {
 public:
  NormedRow(Floats x, Floats weight, int64_t columns, double eps) : x_(x), weight_(weight) {
    if (weight_) {
      inverse_ = 1.0f / std::sqrt(sum_of_squares(x, columns) / columns + static_cast<float>(eps));
    }
  }

  f32x8 load(int64_t i, int64_t count = kLanes) const {
    const f32x8 v = x_.load(i, count);
    if (!weight_) return v;
    const f32x8 normed = v * inverse_ * (1.0f + weight_.load(i, count));
    return x_.is_bf16() ? round_to_bf16(normed) : normed;
  }

 private:
  Floats x_, weight_;
  float inverse_ = 1.0f;
};

// silu(gate) * up of a row [gate | up] of 2 * columns numbers.
template <class Source>
class GatedRow {
 public:
  GatedRow(Source row, int64_t columns) : row_(row), columns_(columns) {}
  f32x8 load(int64_t i, int64_t count = kLanes) const {
    return silu(row_.load(i, count)) * row_.load(columns_ + i, count);
  }

 private:
  Source row_;
  int64_t columns_;
};

}  // namespace et_moe::cpu
