// Weights as matrices that know how to pack an activation row and to multiply it:
//   Element                          what a packed activation row consists of
//   row_elements()                   of one packed row
//   pack(source, Element*)           packs a row; source has f32x8 load(column, count)
//   multiply(first, rows, x, tokens, out, stride)
//                                    out[t * stride + r] = row first + r . x[t], in fp32
// A result depends on its row and its token only, not on what it is computed together with.
#pragma once

#include <type_traits>

#include "backends/cpu/activations.h"

namespace et_moe::cpu {

// Tokens and rows of one multiply() call: a tile of results that stays in the first-level cache.
inline constexpr int64_t kTileTokens = 64;
inline constexpr int64_t kTileRows = 32;

// One row of float weights, or of INT8 weights without their scale, read 16 columns at a time.
template <class T>
struct DenseRow {
  const T* data;
  void load16(int64_t k, f32x8& low, f32x8& high) const {
    low = load(data + k);
    high = load(data + k + kLanes);
  }
  void load_tail(int64_t k, int64_t count, f32x8& low, f32x8& high) const {
    low = load(data + k, std::min<int64_t>(count, kLanes));
    high = count > kLanes ? load(data + k + kLanes, count - kLanes) : f32x8{};
  }
};

inline int group_shift_of(int64_t group_size) { return __builtin_ctzll(group_size); }

// One row of INT4 weights, even columns first (see pack_floats). Its length is a multiple of what
// is read at a time, so no part of a vector is left over.
template <class Scale>
struct Int4Row {
  const uint8_t* packed;
  const Scale* scale;
  int group_shift;
  void load16(int64_t k, f32x8& even, f32x8& odd) const {
    const i32x8 bytes = widen(load_vector<u8x8>(packed + k / 2));
    const f32x8 s = splat(to_float(scale[k >> group_shift]));
    even = __builtin_convertvector((bytes & 0xF) - 8, f32x8) * s;
    odd = __builtin_convertvector((bytes >> 4) - 8, f32x8) * s;
  }
  void load_tail(int64_t, int64_t, f32x8& even, f32x8& odd) const { even = odd = f32x8{}; }
};

template <int kRows, int kTokens, class Row>
inline void float_block(const Row* weights, const float* const* x, int64_t columns, float* out,
                        int64_t stride) {
  f32x8 total[kRows][kTokens] = {};
  const auto add = [&](int64_t k, int r, f32x8 low, f32x8 high) {
    for (int t = 0; t < kTokens; ++t) {
      total[r][t] = fma(low, load(x[t] + k), total[r][t]);
      total[r][t] = fma(high, load(x[t] + k + kLanes), total[r][t]);
    }
  };
  f32x8 low, high;
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
    for (int r = 0; r < kRows; ++r) {
      weights[r].load16(k, low, high);
      add(k, r, low, high);
    }
  }
  if (k < columns) {
    for (int r = 0; r < kRows; ++r) {
      weights[r].load_tail(k, columns - k, low, high);
      add(k, r, low, high);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) out[t * stride + r] = sum(total[r][t]);
  }
}

// Does what multiply() does, for weights that row_at(r) gives row by row.
template <class RowAt>
inline void float_multiply(const RowAt& row_at, int64_t rows, const float* const* x, int64_t tokens,
                           int64_t columns, float* out, int64_t stride) {
  using Row = decltype(row_at(0));
  int64_t r = 0;
  if (tokens == 1) {
    for (; r + 8 <= rows; r += 8) {
      const Row group[8] = {row_at(r),     row_at(r + 1), row_at(r + 2), row_at(r + 3),
                            row_at(r + 4), row_at(r + 5), row_at(r + 6), row_at(r + 7)};
      float_block<8, 1>(group, x, columns, out + r, stride);
    }
  }
  for (; r + 4 <= rows; r += 4) {
    const Row group[4] = {row_at(r), row_at(r + 1), row_at(r + 2), row_at(r + 3)};
    int64_t t = 0;
    for (; t + 3 <= tokens; t += 3) {
      float_block<4, 3>(group, x + t, columns, out + t * stride + r, stride);
    }
    for (; t < tokens; ++t) {
      float_block<4, 1>(group, x + t, columns, out + t * stride + r, stride);
    }
  }
  for (; r < rows; ++r) {
    const Row row = row_at(r);
    for (int64_t t = 0; t < tokens; ++t) {
      float_block<1, 1>(&row, x + t, columns, out + t * stride + r, stride);
    }
  }
}

// Float weights [rows, columns], or INT8 weights without their scales.
template <class T>
class DenseWeights {
 public:
  using Element = float;
  DenseWeights(const T* data, int64_t columns) : data_(data), columns_(columns) {}

  int64_t row_elements() const { return padded_columns(columns_); }

  template <class Source>
  void pack(const Source& source, float* row) const {
    pack_floats<false>(source, columns_, row);
  }

  void multiply(int64_t first, int64_t rows, const float* const* x, int64_t tokens, float* out,
                int64_t stride) const {
    const auto row_at = [&](int64_t r) { return DenseRow<T>{data_ + (first + r) * columns_}; };
    float_multiply(row_at, rows, x, tokens, columns_, out, stride);
  }

 private:
  const T* data_;
  int64_t columns_;
};

// INT8 weights and float activations, which are rounded to bfloat16 first if the model's are.
class Int8Weights {
 public:
  using Element = float;
  explicit Int8Weights(Int8Rows rows)
      : values_(rows.values, rows.columns), scale_(reinterpret_cast<const bf16*>(rows.scale)) {}

  int64_t row_elements() const { return values_.row_elements(); }

  template <class Source>
  void pack(const Source& source, float* row) const {
    values_.pack(source, row);
  }

  void multiply(int64_t first, int64_t rows, const float* const* x, int64_t tokens, float* out,
                int64_t stride) const {
    values_.multiply(first, rows, x, tokens, out, stride);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < rows; ++r) out[t * stride + r] *= to_float(scale_[first + r]);
    }
  }

 private:
  DenseWeights<int8_t> values_;
  const bf16* scale_;
};

// INT4 weights and float activations, which are rounded to bfloat16 first if the model's are.
class Int4Weights {
 public:
  using Element = float;
  explicit Int4Weights(Int4Rows rows)
      : rows_(rows), group_shift_(group_shift_of(rows.group_size)) {}

  int64_t row_elements() const { return padded_columns(rows_.columns); }

  template <class Source>
  void pack(const Source& source, float* row) const {
    pack_floats<true>(source, rows_.columns, row);
  }

  void multiply(int64_t first, int64_t rows, const float* const* x, int64_t tokens, float* out,
                int64_t stride) const {
    if (rows_.scale_type == ScaleType::kFloat16) {
      multiply<fp16>(first, rows, x, tokens, out, stride);
    } else {
      multiply<bf16>(first, rows, x, tokens, out, stride);
    }
  }

 private:
  template <class Scale>
  void multiply(int64_t first, int64_t rows, const float* const* x, int64_t tokens, float* out,
                int64_t stride) const {
    const auto* scale = reinterpret_cast<const Scale*>(rows_.scale);
    const auto row_at = [&](int64_t r) {
      return Int4Row<Scale>{rows_.packed + (first + r) * (rows_.columns / 2),
                            scale + (first + r) * (rows_.columns >> group_shift_), group_shift_};
    };
    float_multiply(row_at, rows, x, tokens, rows_.columns, out, stride);
  }

  Int4Rows rows_;
  int group_shift_;
};

inline Int4Rows rows_from(Int4Rows rows, int64_t first) {
  rows.packed += first * (rows.columns / 2);
  rows.scale += first * (rows.columns / rows.group_size);
  return rows;
}

inline Int8Rows rows_from(Int8Rows rows, int64_t first) {
  rows.values += first * rows.columns;
  rows.scale += first;
  return rows;
}

inline DotFunction<Int4Rows> best_dot_of(const Int4Rows&) { return best_dot().int4; }
inline DotFunction<Int8Rows> best_dot_of(const Int8Rows&) { return best_dot().int8; }

// INT4 or INT8 weights and INT8 activations, in tiles of kTile columns.
template <class Rows, int kTile>
class IntegerWeights {
 public:
  using Element = Int8Chunk;
  explicit IntegerWeights(Rows rows) : rows_(rows) {}

  int64_t row_elements() const { return int8_chunks(rows_.columns); }

  template <class Source>
  void pack(const Source& source, Int8Chunk* row) const {
    pack_int8<kTile, std::is_same_v<Rows, Int4Rows>>(source, rows_.columns, row);
  }

  void multiply(int64_t first, int64_t rows, const Int8Chunk* const* x, int64_t tokens, float* out,
                int64_t stride) const {
    best_dot_of(rows_)(rows_from(rows_, first), rows, x, tokens, out, stride);
  }

 private:
  Rows rows_;
};

inline Int4Rows int4_rows(const Tensor& weight, const Tensor& scale, int64_t columns,
                          int64_t group_size) {
  return {weight.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(scale.const_data_ptr()),
          columns, group_size,
          scale.scalar_type() == ScalarType::Half ? ScaleType::kFloat16 : ScaleType::kBFloat16};
}

inline Int8Rows int8_rows(const Tensor& weight, const Tensor& scale, int64_t columns) {
  return {weight.const_data_ptr<int8_t>(), static_cast<const uint16_t*>(scale.const_data_ptr()),
          columns};
}

}  // namespace et_moe::cpu
