#include "backends/cpu/activations.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

// Quantizes all rows; `row_at(m)` gives row m as a source of `columns` numbers.
template <class RowAt>
void quantize_rows(Op& op, int64_t rows, int64_t columns, int64_t tile, const RowAt& row_at,
                   Tensor& q, Tensor& scale) {
  if (tile <= 0) return void(op.fail("tile: expected at least 1, got %lld", (long long)tile));
  const int64_t tiles = columns / tile + (columns % tile != 0);
  if (!op.output("out0", q, ScalarType::Char, {rows, columns}) ||
      !op.output("out1", scale, ScalarType::Float, {rows, tiles})) {
    return;
  }
  int8_t* q_data = q.mutable_data_ptr<int8_t>();
  float* scale_data = scale.mutable_data_ptr<float>();
  op.parallel(rows, columns * 8, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const auto row = row_at(m);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = i * tile, end = begin + std::min(tile, columns - begin);
        scale_data[m * tiles + i] = quantize_tile(row, begin, end, q_data + m * columns + begin);
      }
    }
  });
}

}  // namespace

void quantize_int8(Op& op, const Tensor& x, int64_t tile, Tensor& q, Tensor& scale) {
  if (!op.check("x", x, kFloats, {kAny, kAny})) return;
  const int64_t columns = x.size(1);
  const Floats data(x);
  quantize_rows(
      op, x.size(0), columns, tile, [&](int64_t m) { return data + m * columns; }, q, scale);
}

void silu_quantize_int8(Op& op, const Tensor& x, int64_t tile, Tensor& q, Tensor& scale) {
  if (!op.check("x", x, kFloats, {kAny, kAny})) return;
  if (x.size(1) % 2 != 0) {
    return void(op.fail("x: expected an even number of columns, got %zd", x.size(1)));
  }
  const int64_t columns = x.size(1) / 2;
  const Floats data(x);
  quantize_rows(
      op, x.size(0), columns, tile,
      [&](int64_t m) { return GatedRow(data + m * 2 * columns, columns); }, q, scale);
}

}  // namespace et_moe::cpu
