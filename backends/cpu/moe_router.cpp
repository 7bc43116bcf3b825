#include "backends/cpu/gemm.h"
#include "backends/cpu/ops.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

namespace {

// Whether logit a comes before b. NaN, which only a broken model has, comes before all others.
bool precedes(float a, float b) { return a > b || (a != a && b == b); }

// The routed experts of one token in order of falling logit, and their weights: the softmax of
// their logits or, unless `normalize`, of all logits.
void select(const float* logits, int64_t experts, int64_t top_k, bool normalize, float* weights,
            int32_t* ids) {
  for (int64_t e = 0; e < experts; ++e) {
    if (e >= top_k && !precedes(logits[e], logits[ids[top_k - 1]])) continue;
    int64_t j = std::min(e, top_k - 1);
    for (; j > 0 && precedes(logits[e], logits[ids[j - 1]]); --j) ids[j] = ids[j - 1];
    ids[j] = static_cast<int32_t>(e);
  }
  const float largest = logits[ids[0]];
  float total = 0.0f;
  for (int64_t j = 0; j < top_k; ++j) {
    weights[j] = std::exp(logits[ids[j]] - largest);
    total += weights[j];
  }
  if (!normalize) {
    total = 0.0f;
    for (int64_t e = 0; e < experts; ++e) total += std::exp(logits[e] - largest);
  }
  for (int64_t j = 0; j < top_k; ++j) weights[j] /= total;
}

template <class T>
class Router {
 public:
  Router(Op& op, const Tensor& weight, int64_t top_k, int64_t num_shared, bool normalize)
      : op_(op),
        weight_(weight.const_data_ptr<T>(), weight.size(1)),
        hidden_(weight.size(1)),
        experts_(weight.size(0) - 1),
        top_k_(top_k),
        num_shared_(num_shared),
        normalize_(normalize) {}

  void run(const Tensor& x, const Tensor& norm_weight, double eps, const Sequences& sequences,
           const Tensor& normed, float* weights, int32_t* ids) {
    const int64_t tokens = x.size(0), rows = experts_ + 1, slots = top_k_ + num_shared_;
    float* packed = op_.scratch<float>(tokens * weight_.row_elements());
    float* logits = op_.scratch<float>(sequences.valid * rows);
    if (packed == nullptr || logits == nullptr) return;
    norm(x, norm_weight, eps, MutableFloats(normed), packed);
    multiply(packed, sequences, logits);
    if (sequences.padding > 0) {
      std::fill_n(weights, tokens * slots, 0.0f);
      std::fill_n(ids, tokens * slots, -1);
    }
    op_.parallel(sequences.valid, experts_ * 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = sequences.row(i) * slots;
        route(logits + i * rows, weights + at, ids + at);
      }
    });
  }

 private:
  void norm(const Tensor& x, const Tensor& norm_weight, double eps, MutableFloats normed,
            float* packed) {
    const Floats input(x), weight(norm_weight);
    op_.parallel(x.size(0), hidden_ * 8, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const NormedRow row(input + t * hidden_, weight, hidden_, eps);
        weight_.pack(row, packed + t * weight_.row_elements());
        for_lanes(hidden_, [&](int64_t i, int64_t count) {
          normed.store(t * hidden_ + i, row.load(i, count), count);
        });
      }
    });
  }

  // The logits of valid rows.
  void multiply(const float* packed, const Sequences& sequences, float* logits) {
    const int64_t rows = experts_ + 1, tokens = sequences.valid;
    const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
    op_.parallel(blocks, kTileRows * hidden_ * tokens, [&](int64_t first, int64_t last) {
      const float* inputs[kTileTokens];
      const int64_t row = first * kTileRows, count = std::min(rows, last * kTileRows) - row;
      for (int64_t token = 0; token < tokens; token += kTileTokens) {
        const int64_t tile = std::min(kTileTokens, tokens - token);
        for (int64_t t = 0; t < tile; ++t) {
          inputs[t] = packed + sequences.row(token + t) * weight_.row_elements();
        }
        weight_.multiply(row, count, inputs, tile, logits + token * rows + row, rows);
      }
    });
  }

  void route(const float* logits, float* weights, int32_t* ids) {
    select(logits, experts_, top_k_, normalize_, weights, ids);
    const float gate = 1.0f / (1.0f + std::exp(-logits[experts_]));
    for (int64_t j = 0; j < num_shared_; ++j) {
      weights[top_k_ + j] = gate;
      ids[top_k_ + j] = static_cast<int32_t>(experts_ + j);
    }
  }

  Op& op_;
  DenseWeights<T> weight_;
  int64_t hidden_, experts_, top_k_, num_shared_;
  bool normalize_;
};

}  // namespace

void moe_router(Op& op, const Tensor& x, const Tensor& norm_weight, const Tensor& weight,
                int64_t top_k, int64_t num_shared, double eps, const OptionalTensor& num_tokens,
                bool normalize, Tensor& normed, Tensor& topk_weights, Tensor& topk_ids) {
  Sequences sequences;
  if (!op.check("x", x, kFloats, {kAny, kAny}) ||
      !op.check("norm_weight", norm_weight, kFloats, {x.size(1)}) ||
      !op.check("weight", weight, kFloats, {kAny, x.size(1)}) ||
      !op.check("num_tokens", num_tokens, {ScalarType::Long}, {kAny})) {
    return;
  }
  const int64_t count = num_tokens.has_value() ? num_tokens->size(0) : 1;
  if (!read_sequences(op, "x", x.size(0), count, num_tokens, &sequences)) return;
  const int64_t experts = weight.size(0) - 1;
  if (top_k < 1 || top_k > experts) {
    return void(op.fail("top_k: expected 1..%lld, got %lld", (long long)experts, (long long)top_k));
  }
  if (num_shared < 0 || num_shared > (1 << 20)) {
    return void(op.fail("num_shared: expected 0 or more, got %lld", (long long)num_shared));
  }
  const Sizes slots = {x.size(0), top_k + num_shared};
  if (!op.output("out0", normed, x.scalar_type(), {x.size(0), x.size(1)}) ||
      !op.output("out1", topk_weights, ScalarType::Float, slots) ||
      !op.output("out2", topk_ids, ScalarType::Int, slots)) {
    return;
  }
  const auto run = [&](auto router) {
    router.run(x, norm_weight, eps, sequences, normed, topk_weights.mutable_data_ptr<float>(),
               topk_ids.mutable_data_ptr<int32_t>());
  };
  if (weight.scalar_type() == ScalarType::BFloat16) {
    run(Router<bf16>(op, weight, top_k, num_shared, normalize));
  } else {
    run(Router<float>(op, weight, top_k, num_shared, normalize));
  }
}

}  // namespace et_moe::cpu
