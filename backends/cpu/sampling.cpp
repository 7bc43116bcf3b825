#include "backends/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

// The lowest i below n with the largest score(i), which must not be NaN.
template <class Score>
int64_t argmax(Op& op, int64_t n, int64_t work, const Score& score) {
  constexpr int64_t kBlock = 1024;
  struct Best {
    float value;
    int64_t index;
  };
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  Best* best = op.scratch<Best>(blocks);
  if (best == nullptr) return 0;
  op.parallel(blocks, kBlock * work, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(n, begin + kBlock);
      Best result{score(begin), begin};
      for (int64_t i = begin + 1; i < end; ++i) {
        const float value = score(i);
        if (value > result.value) result = {value, i};
      }
      best[block] = result;
    }
  });
  int64_t winner = 0;
  for (int64_t block = 1; block < blocks; ++block) {
    if (best[block].value > best[winner].value) winner = block;
  }
  return best[winner].index;
}

struct Parameters {
  float temperature, top_p;
  int64_t top_k, seed, position;
};

int64_t draw(Op& op, const float* logits, int64_t n, const Parameters& parameters) {
  const float temperature = parameters.temperature;
  if (temperature == 0.0f) return argmax(op, n, 1, [&](int64_t i) { return logits[i]; });
  const int64_t top_k = parameters.top_k < n ? parameters.top_k : 0;
  const float lowest = -std::numeric_limits<float>::infinity();
  float kept = lowest;
  if (top_k > 0 || parameters.top_p < 1.0f) {
    float* heap = op.scratch<float>(n);
    if (heap == nullptr) return 0;
    for (int64_t i = 0; i < n; ++i) heap[i] = logits[i] / temperature;
    kept = sampling::threshold(heap, n, top_k, parameters.top_p);
  }
  const auto position = static_cast<uint32_t>(parameters.position);
  const auto seed = static_cast<uint64_t>(parameters.seed);
  return argmax(op, n, 32, [&](int64_t i) {
    const float scaled = logits[i] / temperature;
    if (scaled < kept || scaled == lowest) return lowest;
    return scaled + sampling::gumbel(static_cast<uint32_t>(i), position, seed);
  });
}

bool check_parameters(Op& op, const Parameters& parameters) {
  if (parameters.temperature < 0.0f) {
    return op.fail("temperature: expected at least 0, got %g", parameters.temperature);
  }
  if (parameters.top_k < 0) {
    return op.fail("top_k: expected at least 0, got %lld", (long long)parameters.top_k);
  }
  if (!(parameters.top_p > 0.0f && parameters.top_p <= 1.0f)) {
    return op.fail("top_p: expected a number above 0 and at most 1, got %g", parameters.top_p);
  }
  return true;
}

}  // namespace

void sample(Op& op, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& seed, const Tensor& position, Tensor& out) {
  Parameters parameters;
  if (!op.check("logits", logits, {ScalarType::Float}, {1, kAny}) ||
      !op.scalar("temperature", temperature, &parameters.temperature) ||
      !op.scalar("top_k", top_k, &parameters.top_k) ||
      !op.scalar("top_p", top_p, &parameters.top_p) || !op.scalar("seed", seed, &parameters.seed) ||
      !op.scalar("position", position, &parameters.position) || !check_parameters(op, parameters) ||
      !op.output("out", out, ScalarType::Long, {1, 1})) {
    return;
  }
  const int64_t n = logits.size(1);
  const float* data = logits.const_data_ptr<float>();
  if (n < 1) return void(op.fail("logits: the vocabulary is empty"));
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(data[i]) || data[i] == std::numeric_limits<float>::infinity()) {
      return void(op.fail("logits: token %lld has %g", (long long)i, data[i]));
    }
  }
  *out.mutable_data_ptr<int64_t>() = draw(op, data, n, parameters);
}

}  // namespace et_moe::cpu
