// Expert MLPs. Tokens are grouped by expert, so that each expert's weights are read once, and
// threads share out rows of every expert's weights, so that they are busy however tokens spread.
#include "backends/cpu/gemm.h"
#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

struct Routing {
  const Tensor& topk_weights;
  const Tensor& topk_ids;
};

struct Slot {
  int64_t token;
  float weight;
};

// The slots in use, ordered by expert, then token: those of active expert i are
// slots[begin[i]..begin[i + 1]).
struct Groups {
  int64_t active = 0;
  int64_t* expert = nullptr;
  int64_t* begin = nullptr;
  Slot* slots = nullptr;
};

int64_t id_at(const Tensor& ids, int64_t i) {
  return ids.scalar_type() == ScalarType::Int ? ids.const_data_ptr<int32_t>()[i]
                                              : ids.const_data_ptr<int64_t>()[i];
}

// Makes `groups` by a counting sort.
bool group_by_expert(Op& op, const Routing& routing, int64_t experts, Groups* groups) {
  const Tensor& ids = routing.topk_ids;
  const int64_t slots = ids.numel(), per_token = ids.size(1);
  int64_t* offset = op.scratch<int64_t>(experts + 1);
  groups->expert = op.scratch<int64_t>(experts);
  groups->begin = op.scratch<int64_t>(experts + 1);
  groups->slots = op.scratch<Slot>(slots);
  if (!offset || !groups->expert || !groups->begin || !groups->slots) return false;
  std::fill(offset, offset + experts + 1, 0);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = id_at(ids, i);
    if (id >= 0 && id < experts) ++offset[id + 1];
  }
  groups->begin[0] = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (offset[e + 1] > 0) {
      groups->expert[groups->active] = e;
      groups->begin[++groups->active] = offset[e] + offset[e + 1];
    }
    offset[e + 1] += offset[e];
  }
  const Floats weights(routing.topk_weights);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t id = id_at(ids, i);
    if (id >= 0 && id < experts) groups->slots[offset[id]++] = {i / per_token, weights[i]};
  }
  return true;
}

// Calls body(i, row, row count, slot, slot count) for tiles of rows 0..rows of every active expert
// i and of its slots. Tiles of one row block are in one thread, experts in rising order.
template <class Body>
void for_tiles(Op& op, const Groups& groups, int64_t rows, int64_t columns, const Body& body) {
  const int64_t slots = groups.begin[groups.active];
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  op.parallel(blocks, kTileRows * columns * slots, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(rows, last * kTileRows);
    for (int64_t i = 0; i < groups.active; ++i) {
      for (int64_t row = first * kTileRows; row < end; row += kTileRows) {
        for (int64_t slot = groups.begin[i]; slot < groups.begin[i + 1]; slot += kTileTokens) {
          body(i, row, std::min(kTileRows, end - row), slot,
               std::min(kTileTokens, groups.begin[i + 1] - slot));
        }
      }
    }
  });
}

struct FloatRow {
  const float* data;
  f32x8 load(int64_t i, int64_t count) const { return cpu::load(data + i, count); }
};

struct RoundedRow {
  GatedRow<FloatRow> row;
  f32x8 load(int64_t i, int64_t count) const { return round_to_bf16(row.load(i, count)); }
};

// One call of an expert op. Up: w13 as [experts * 2 * inner, hidden] rows; Down: w2 as
// [experts * hidden, inner] rows.
template <class Up, class Down>
class Experts {
 public:
  // round_inner: silu(gate) * up is rounded to bfloat16.
  Experts(Op& op, const Up& up, const Down& down, int64_t hidden, int64_t inner, bool round_inner)
      : op_(op), up_(up), down_(down), hidden_(hidden), inner_(inner), round_inner_(round_inner) {}

  void run(const Tensor& x, const Groups& groups, const OptionalTensor& residual, Tensor& out) {
    const int64_t tokens = x.size(0), slots = groups.begin[groups.active];
    auto* packed_x = op_.scratch<UpElement>(tokens * up_.row_elements());
    auto* gate_up = op_.scratch<float>(slots * 2 * inner_);
    auto* packed_inner = op_.scratch<DownElement>(slots * down_.row_elements());
    auto* sums = op_.scratch<float>(tokens * hidden_);
    if (!packed_x || !gate_up || !packed_inner || !sums) return;
    pack_tokens(Floats(x), tokens, packed_x);
    multiply_up(groups, packed_x, gate_up);
    activate(gate_up, slots, packed_inner);
    std::fill(sums, sums + tokens * hidden_, 0.0f);
    multiply_down(groups, packed_inner, sums);
    add_residual(sums, tokens * hidden_, Floats(residual), MutableFloats(out));
  }

 private:
  using UpElement = typename Up::Element;
  using DownElement = typename Down::Element;

  void pack_tokens(Floats x, int64_t tokens, UpElement* packed) {
    op_.parallel(tokens, hidden_ * 8, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        up_.pack(x + t * hidden_, packed + t * up_.row_elements());
      }
    });
  }

  // gate_up[slot] = w13[expert] x[token].
  void multiply_up(const Groups& groups, const UpElement* x, float* gate_up) {
    const int64_t rows = 2 * inner_;
    for_tiles(op_, groups, rows, hidden_,
              [&](int64_t i, int64_t row, int64_t count, int64_t slot, int64_t slots) {
                const UpElement* inputs[kTileTokens];
                for (int64_t s = 0; s < slots; ++s) {
                  inputs[s] = x + groups.slots[slot + s].token * up_.row_elements();
                }
                up_.multiply(groups.expert[i] * rows + row, count, inputs, slots,
                             gate_up + slot * rows + row, rows);
              });
  }

  void activate(const float* gate_up, int64_t slots, DownElement* packed) {
    op_.parallel(slots, inner_ * 32, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const GatedRow row(FloatRow{gate_up + slot * 2 * inner_}, inner_);
        DownElement* target = packed + slot * down_.row_elements();
        if (round_inner_) {
          down_.pack(RoundedRow{row}, target);
        } else {
          down_.pack(row, target);
        }
      }
    });
  }

  // sums[token] += weight * w2[expert] inner[slot].
  void multiply_down(const Groups& groups, const DownElement* inner, float* sums) {
    for_tiles(op_, groups, hidden_, inner_,
              [&](int64_t i, int64_t row, int64_t count, int64_t slot, int64_t slots) {
                float tile[kTileTokens * kTileRows];
                const DownElement* inputs[kTileTokens];
                for (int64_t s = 0; s < slots; ++s) {
                  inputs[s] = inner + (slot + s) * down_.row_elements();
                }
                down_.multiply(groups.expert[i] * hidden_ + row, count, inputs, slots, tile,
                               kTileRows);
                for (int64_t s = 0; s < slots; ++s) {
                  const Slot& target = groups.slots[slot + s];
                  add_scaled(tile + s * kTileRows, target.weight, count,
                             sums + target.token * hidden_ + row);
                }
              });
  }

  static void add_scaled(const float* y, float weight, int64_t n, float* sums) {
    for_lanes(n, [&](int64_t i, int64_t count) {
      const f32x8 total = fma(load(y + i, count), splat(weight), load(sums + i, count));
      store(sums + i, total, count);
    });
  }

  void add_residual(const float* sums, int64_t n, Floats residual, MutableFloats out) {
    const int64_t vectors = (n + kLanes - 1) / kLanes;
    op_.parallel(vectors, kLanes, [&](int64_t first, int64_t last) {
      const int64_t begin = first * kLanes;
      for_lanes(std::min(n, last * kLanes) - begin, [&](int64_t i, int64_t count) {
        f32x8 y = load(sums + begin + i, count);
        if (residual) y += residual.load(begin + i, count);
        out.store(begin + i, y, count);
      });
    });
  }

  Op& op_;
  const Up& up_;
  const Down& down_;
  int64_t hidden_, inner_;
  bool round_inner_;
};

// The arguments that all ops share.
bool check_arguments(Op& op, const Tensor& x, const Routing& routing,
                     const OptionalTensor& residual, Tensor& out) {
  const int64_t tokens = x.size(0);
  return op.check("topk_weights", routing.topk_weights, kFloats, {tokens, kAny}) &&
         op.check("topk_ids", routing.topk_ids, {ScalarType::Int, ScalarType::Long},
                  {tokens, routing.topk_weights.size(1)}) &&
         op.check("residual", residual, kFloats, {tokens, x.size(1)}) &&
         op.output("out", out, x.scalar_type(), {tokens, x.size(1)});
}

// w13 [E, 2I, H / packing] and w2 [E, H, I / packing]; `inner` becomes I.
bool check_weights(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w2, Types types,
                   int64_t packing, int64_t* inner) {
  const int64_t hidden = x.size(1);
  if (!op.check("w13", w13, types, {kAny, kAny, hidden / packing})) return false;
  *inner = w13.size(1) / 2;
  if (w13.size(1) % 2 != 0) {
    return op.fail("w13: expected gate and up rows in pairs, got %zd rows", w13.size(1));
  }
  return op.check("w2", w2, types, {w13.size(0), hidden, *inner / packing});
}

template <class T>
void run_dense(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w2, int64_t inner,
               const Groups& groups, const OptionalTensor& residual, Tensor& out) {
  const DenseWeights up(w13.const_data_ptr<T>(), x.size(1));
  const DenseWeights down(w2.const_data_ptr<T>(), inner);
  Experts(op, up, down, x.size(1), inner, false).run(x, groups, residual, out);
}

template <class Up, class Down>
void run_int4(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Routing& routing, int64_t group_size, bool round_inner,
              const OptionalTensor& residual, Tensor& out) {
  int64_t inner = 0;
  Groups groups;
  if (!op.check("x", x, kFloats, {kAny, kAny}) || !op.group_size(group_size, x.size(1)) ||
      !check_weights(op, x, w13, w2, {ScalarType::Byte}, 2, &inner) ||
      !op.group_size(group_size, inner) ||
      !op.check("w13_scale", w13_scale, kScales,
                {w13.size(0), 2 * inner, x.size(1) / group_size}) ||
      !op.check("w2_scale", w2_scale, kScales, {w13.size(0), x.size(1), inner / group_size}) ||
      !check_arguments(op, x, routing, residual, out) ||
      !group_by_expert(op, routing, w13.size(0), &groups)) {
    return;
  }
  const Up up(int4_rows(w13, w13_scale, x.size(1), group_size));
  const Down down(int4_rows(w2, w2_scale, inner, group_size));
  Experts(op, up, down, x.size(1), inner, round_inner).run(x, groups, residual, out);
}

template <class Up, class Down>
void run_int8(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Routing& routing, bool round_inner,
              const OptionalTensor& residual, Tensor& out) {
  int64_t inner = 0;
  Groups groups;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !check_weights(op, x, w13, w2, {ScalarType::Char}, 1, &inner) ||
      !op.check("w13_scale", w13_scale, {ScalarType::BFloat16}, {w13.size(0), 2 * inner, 1}) ||
      !op.check("w2_scale", w2_scale, {ScalarType::BFloat16}, {w13.size(0), x.size(1), 1}) ||
      !check_arguments(op, x, routing, residual, out) ||
      !group_by_expert(op, routing, w13.size(0), &groups)) {
    return;
  }
  const Up up(int8_rows(w13, w13_scale, x.size(1)));
  const Down down(int8_rows(w2, w2_scale, inner));
  Experts(op, up, down, x.size(1), inner, round_inner).run(x, groups, residual, out);
}

// Whether the experts are so narrow that the tiles between their products are
// (expert_activation_tile of the op contracts).
bool is_narrow(const Tensor& w13) { return w13.dim() == 3 && w13.size(1) <= 2 * 128; }

}  // namespace

void moe(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& topk_weights,
         const Tensor& topk_ids, const OptionalTensor& residual, Tensor& out) {
  const Routing routing{topk_weights, topk_ids};
  int64_t inner = 0;
  Groups groups;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !check_weights(op, x, w13, w2, kFloats, 1, &inner) ||
      !op.check("w2", w2, {w13.scalar_type()}, {kAny, kAny, kAny}) ||
      !check_arguments(op, x, routing, residual, out) ||
      !group_by_expert(op, routing, w13.size(0), &groups)) {
    return;
  }
  const bool is_bf16 = w13.scalar_type() == ScalarType::BFloat16;
  (is_bf16 ? run_dense<bf16> : run_dense<float>)(op, x, w13, w2, inner, groups, residual, out);
}

void moe_w4a8(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Tensor& topk_weights, const Tensor& topk_ids,
              int64_t group_size, const OptionalTensor& residual, Tensor& out) {
  using Up = IntegerWeights<Int4Rows, kActivationTile>;
  const auto run = is_narrow(w13) ? run_int4<Up, IntegerWeights<Int4Rows, 32>>
                                  : run_int4<Up, IntegerWeights<Int4Rows, 64>>;
  run(op, x, w13, w13_scale, w2, w2_scale, {topk_weights, topk_ids}, group_size, false, residual,
      out);
}

void moe_w4a16(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale,
               const Tensor& w2, const Tensor& w2_scale, const Tensor& topk_weights,
               const Tensor& topk_ids, int64_t group_size, const OptionalTensor& residual,
               Tensor& out) {
  run_int4<Int4Weights, Int4Weights>(op, x, w13, w13_scale, w2, w2_scale, {topk_weights, topk_ids},
                                     group_size, x.scalar_type() == ScalarType::BFloat16, residual,
                                     out);
}

void moe_w8a8(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale, const Tensor& w2,
              const Tensor& w2_scale, const Tensor& topk_weights, const Tensor& topk_ids,
              const OptionalTensor& residual, Tensor& out) {
  using Up = IntegerWeights<Int8Rows, kActivationTile>;
  const auto run = is_narrow(w13) ? run_int8<Up, IntegerWeights<Int8Rows, 32>>
                                  : run_int8<Up, IntegerWeights<Int8Rows, 64>>;
  run(op, x, w13, w13_scale, w2, w2_scale, {topk_weights, topk_ids}, false, residual, out);
}

void moe_w8a16(Op& op, const Tensor& x, const Tensor& w13, const Tensor& w13_scale,
               const Tensor& w2, const Tensor& w2_scale, const Tensor& topk_weights,
               const Tensor& topk_ids, const OptionalTensor& residual, Tensor& out) {
  run_int8<Int8Weights, Int8Weights>(op, x, w13, w13_scale, w2, w2_scale, {topk_weights, topk_ids},
                                     x.scalar_type() == ScalarType::BFloat16, residual, out);
}

}  // namespace et_moe::cpu
