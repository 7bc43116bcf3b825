#include "backends/cpu/gemm.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

struct Fusion {
  const OptionalTensor& norm_weight;
  double eps;
  const OptionalTensor& residual;
};

bool check_arguments(Op& op, const Tensor& x, int64_t rows, const Fusion& fusion, Tensor& out) {
  return op.check("norm_weight", fusion.norm_weight, kFloats, {x.size(1)}) &&
         op.check("residual", fusion.residual, kFloats, {x.size(0), rows}) &&
         op.output("out", out, x.scalar_type(), {x.size(0), rows});
}

// Of an embedding: the dtype of its result.
bool check_dtype(Op& op, int64_t dtype) {
  const auto type = static_cast<ScalarType>(dtype);
  return type == ScalarType::Float || type == ScalarType::BFloat16 ||
         op.fail("dtype: expected float32 or bfloat16, got %lld", (long long)dtype);
}

// Fails unless all ids are rows of a table.
bool check_ids(Op& op, const Tensor& ids, int64_t vocabulary) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < ids.size(0); ++t) {
    if (id[t] < 0 || id[t] >= vocabulary) {
      return op.fail("ids: token %lld at %lld is outside 0..%lld", (long long)id[t], (long long)t,
                     (long long)vocabulary - 1);
    }
  }
  return true;
}

template <class Scale>
void copy_int4_rows(const Tensor& ids, const Tensor& weight, const Tensor& scale,
                    int64_t group_size, Tensor& out) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const auto* packed = weight.const_data_ptr<uint8_t>();
  const auto* scales = scale.const_data_ptr<Scale>();
  const int64_t columns = out.size(1), groups = scale.size(1);
  const MutableFloats output(out);
  for (int64_t t = 0; t < ids.size(0); ++t) {
    const Int4Row<Scale> row{packed + id[t] * (columns / 2), scales + id[t] * groups,
                             group_shift_of(group_size)};
    for (int64_t k = 0; k < columns; k += 2 * kLanes) {
      f32x8 even, odd;
      row.load16(k, even, odd);
      float pairs[2 * kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[2 * i] = even[i], pairs[2 * i + 1] = odd[i];
      output.store(t * columns + k, load(pairs), kLanes);
      output.store(t * columns + k + kLanes, load(pairs + kLanes), kLanes);
    }
  }
}

// out[t, n] = tile[t * kTileRows + n] + residual[t, n] for a tile at (token, row).
void store_tile(const float* tile, int64_t token, int64_t tokens, int64_t row, int64_t rows,
                int64_t columns, Floats residual, MutableFloats out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (token + t) * columns + row;
    for_lanes(rows, [&](int64_t i, int64_t count) {
      f32x8 y = load(tile + t * kTileRows + i);
      if (residual) y += residual.load(at + i, count);
      out.store(at + i, y, count);
    });
  }
}

template <class Weights>
void run(Op& op, const Weights& weights, const Tensor& x, const Fusion& fusion, Tensor& out) {
  using Element = typename Weights::Element;
  const int64_t tokens = x.size(0), columns = x.size(1), rows = out.size(1);
  const int64_t stride = weights.row_elements();
  Element* packed = op.scratch<Element>(tokens * stride);
  if (packed == nullptr) return;
  const Floats input(x), norm_weight(fusion.norm_weight), residual(fusion.residual);
  const MutableFloats output(out);
  op.parallel(tokens, columns * 8, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      weights.pack(NormedRow(input + t * columns, norm_weight, columns, fusion.eps),
                   packed + t * stride);
    }
  });
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  op.parallel(blocks, kTileRows * columns * tokens, [&](int64_t first, int64_t last) {
    float tile[kTileTokens * kTileRows];
    const Element* inputs[kTileTokens];
    for (int64_t row = first * kTileRows; row < std::min(rows, last * kTileRows);
         row += kTileRows) {
      const int64_t tile_rows = std::min(kTileRows, rows - row);
      for (int64_t token = 0; token < tokens; token += kTileTokens) {
        const int64_t tile_tokens = std::min(kTileTokens, tokens - token);
        for (int64_t t = 0; t < tile_tokens; ++t) inputs[t] = packed + (token + t) * stride;
        weights.multiply(row, tile_rows, inputs, tile_tokens, tile, kTileRows);
        store_tile(tile, token, tile_tokens, row, tile_rows, rows, residual, output);
      }
    }
  });
}

template <class Weights>
void run_int4(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
              int64_t group_size, const Fusion& fusion, Tensor& out) {
  if (!op.check("x", x, kFloats, {kAny, kAny}) || !op.group_size(group_size, x.size(1)) ||
      !op.check("weight", weight, {ScalarType::Byte}, {kAny, x.size(1) / 2}) ||
      !op.check("scale", scale, kScales, {weight.size(0), x.size(1) / group_size}) ||
      !check_arguments(op, x, weight.size(0), fusion, out)) {
    return;
  }
  run(op, Weights(int4_rows(weight, scale, x.size(1), group_size)), x, fusion, out);
}

template <class Weights>
void run_int8(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
              const Fusion& fusion, Tensor& out) {
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("weight", weight, {ScalarType::Char}, {kAny, x.size(1)}) ||
      !op.check("scale", scale, {ScalarType::BFloat16}, {weight.size(0), 1}) ||
      !check_arguments(op, x, weight.size(0), fusion, out)) {
    return;
  }
  run(op, Weights(int8_rows(weight, scale, x.size(1))), x, fusion, out);
}

}  // namespace

void rms_norm(Op& op, const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("weight", weight, kFloats, {x.size(1)}) ||
      !op.output("out", out, x.scalar_type(), {x.size(0), x.size(1)})) {
    return;
  }
  const int64_t columns = x.size(1);
  const Floats input(x), norm_weight(weight);
  const MutableFloats output(out);
  op.parallel(x.size(0), columns * 8, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const NormedRow row(input + t * columns, norm_weight, columns, eps);
      for_lanes(columns, [&](int64_t i, int64_t count) {
        output.store(t * columns + i, row.load(i, count), count);
      });
    }
  });
}

void linear(Op& op, const Tensor& x, const Tensor& weight, const OptionalTensor& norm_weight,
            double eps, const OptionalTensor& residual, Tensor& out) {
  const Fusion fusion{norm_weight, eps, residual};
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("weight", weight, kFloats, {kAny, x.size(1)}) ||
      !check_arguments(op, x, weight.size(0), fusion, out)) {
    return;
  }
  if (weight.scalar_type() == ScalarType::BFloat16) {
    run(op, DenseWeights(weight.const_data_ptr<bf16>(), x.size(1)), x, fusion, out);
  } else {
    run(op, DenseWeights(weight.const_data_ptr<float>(), x.size(1)), x, fusion, out);
  }
}

void linear_w4a8(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 int64_t group_size, const OptionalTensor& norm_weight, double eps,
                 const OptionalTensor& residual, Tensor& out) {
  run_int4<IntegerWeights<Int4Rows, kActivationTile>>(op, x, weight, scale, group_size,
                                                      {norm_weight, eps, residual}, out);
}

void linear_w4a16(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  int64_t group_size, const OptionalTensor& norm_weight, double eps,
                  const OptionalTensor& residual, Tensor& out) {
  run_int4<Int4Weights>(op, x, weight, scale, group_size, {norm_weight, eps, residual}, out);
}

void linear_w8a8(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                 const OptionalTensor& norm_weight, double eps, const OptionalTensor& residual,
                 Tensor& out) {
  run_int8<IntegerWeights<Int8Rows, kActivationTile>>(op, x, weight, scale,
                                                      {norm_weight, eps, residual}, out);
}

void linear_w8a16(Op& op, const Tensor& x, const Tensor& weight, const Tensor& scale,
                  const OptionalTensor& norm_weight, double eps, const OptionalTensor& residual,
                  Tensor& out) {
  run_int8<Int8Weights>(op, x, weight, scale, {norm_weight, eps, residual}, out);
}

void embedding_w8(Op& op, const Tensor& ids, const Tensor& weight, const Tensor& scale,
                  int64_t dtype, Tensor& out) {
  if (!check_dtype(op, dtype) || !op.check("ids", ids, {ScalarType::Long}, {kAny}) ||
      !op.check("weight", weight, {ScalarType::Char}, {kAny, kAny}) ||
      !op.check("scale", scale, {ScalarType::BFloat16}, {weight.size(0), 1}) ||
      !op.output("out", out, static_cast<ScalarType>(dtype), {ids.size(0), weight.size(1)}) ||
      !check_ids(op, ids, weight.size(0))) {
    return;
  }
  const int64_t tokens = ids.size(0), columns = weight.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const Floats scales(scale);
  const MutableFloats output(out);
  const int8_t* table = weight.const_data_ptr<int8_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    const int8_t* row = table + id[t] * columns;
    const float row_scale = scales[id[t]];
    for_lanes(columns, [&](int64_t i, int64_t count) {
      output.store(t * columns + i, load(row + i, count) * row_scale, count);
    });
  }
}

void embedding_w4(Op& op, const Tensor& ids, const Tensor& weight, const Tensor& scale,
                  int64_t group_size, int64_t dtype, Tensor& out) {
  if (!check_dtype(op, dtype) || !op.check("ids", ids, {ScalarType::Long}, {kAny}) ||
      !op.check("weight", weight, {ScalarType::Byte}, {kAny, kAny}) ||
      !op.group_size(group_size, 2 * weight.size(1)) ||
      !op.check("scale", scale, kScales, {weight.size(0), 2 * weight.size(1) / group_size}) ||
      !op.output("out", out, static_cast<ScalarType>(dtype), {ids.size(0), 2 * weight.size(1)}) ||
      !check_ids(op, ids, weight.size(0))) {
    return;
  }
  if (scale.scalar_type() == ScalarType::Half) {
    copy_int4_rows<fp16>(ids, weight, scale, group_size, out);
  } else {
    copy_int4_rows<bf16>(ids, weight, scale, group_size, out);
  }
}

}  // namespace et_moe::cpu
