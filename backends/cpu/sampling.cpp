#include "backends/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/cpu/ops.h"

namespace et_moe::cpu {

namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Of all sequences.
struct Parameters {
  const float *temperature, *top_p;
  const int64_t *top_k, *seed, *position;
};

// How the token of one sequence is drawn: it is the one with the largest score.
struct Draw {
  const float* logits;
  float temperature;
  float kept;  // the smallest scaled logit that top-k and top-p keep
  uint64_t seed;
  uint32_t position;

  // Not of greedy sequences, whose temperature is 0.
  float score(int64_t i) const {
    const float scaled = logits[i] / temperature;
    if (scaled < kept || scaled == kLowest) return kLowest;
    return scaled + sampling::gumbel(static_cast<uint32_t>(i), position, seed);
  }
};

struct Best {
  float value;
  int64_t index;
};

// The lowest i of begin..end with the largest score, which must not be NaN.
template <class Score>
Best best_of(int64_t begin, int64_t end, const Score& score) {
  Best result{score(begin), begin};
  for (int64_t i = begin + 1; i < end; ++i) {
    const float value = score(i);
    if (value > result.value) result = {value, i};
  }
  return result;
}

// Draws a token for each sequence. Threads share out blocks of all sequences' logits.
void draw_tokens(Op& op, const Draw* draws, int64_t sequences, int64_t n, int64_t* tokens) {
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  Best* best = op.scratch<Best>(sequences * blocks);
  if (best == nullptr) return;
  bool noise = false;
  for (int64_t b = 0; b < sequences; ++b) noise |= draws[b].temperature != 0.0f;
  op.parallel(sequences * blocks, kBlock * (noise ? 32 : 1), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const Draw draw = draws[item / blocks];
      const int64_t begin = item % blocks * kBlock, end = std::min(n, begin + kBlock);
      best[item] = draw.temperature == 0.0f
                       ? best_of(begin, end, [&](int64_t i) { return draw.logits[i]; })
                       : best_of(begin, end, [&](int64_t i) { return draw.score(i); });
    }
  });
  for (int64_t b = 0; b < sequences; ++b) {
    const Best* own = best + b * blocks;
    int64_t winner = 0;
    for (int64_t block = 1; block < blocks; ++block) {
      if (own[block].value > own[winner].value) winner = block;
    }
    tokens[b] = own[winner].index;
  }
}

// Sets `kept` of the sequences whose tokens are filtered. Threads share out these sequences.
bool filter(Op& op, const Parameters& parameters, int64_t sequences, int64_t n, Draw* draws) {
  auto* filtered = op.scratch<int64_t>(sequences);
  if (filtered == nullptr) return false;
  int64_t count = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const bool all_kept =
        (parameters.top_k[b] == 0 || parameters.top_k[b] >= n) && parameters.top_p[b] >= 1.0f;
    if (draws[b].temperature != 0.0f && !all_kept) filtered[count++] = b;
  }
  float* heaps = op.scratch<float>(count * n);
  if (heaps == nullptr) return false;
  op.parallel(count, n * 4, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t b = filtered[item], top_k = parameters.top_k[b];
      float* heap = heaps + item * n;
      for (int64_t i = 0; i < n; ++i) heap[i] = draws[b].logits[i] / draws[b].temperature;
      draws[b].kept = sampling::threshold(heap, n, top_k < n ? top_k : 0, parameters.top_p[b]);
    }
  });
  return true;
}

bool check_parameters(Op& op, const Parameters& parameters, int64_t sequences) {
  for (int64_t b = 0; b < sequences; ++b) {
    const float temperature = parameters.temperature[b], top_p = parameters.top_p[b];
    if (!(temperature >= 0.0f && std::isfinite(temperature))) {
      return op.fail("temperature: expected a finite number of at least 0, got %g of sequence %lld",
                     temperature, (long long)b);
    }
    if (parameters.top_k[b] < 0) {
      return op.fail("top_k: expected at least 0, got %lld of sequence %lld",
                     (long long)parameters.top_k[b], (long long)b);
    }
    if (!(top_p > 0.0f && top_p <= 1.0f)) {
      return op.fail("top_p: expected a number above 0 and at most 1, got %g of sequence %lld",
                     top_p, (long long)b);
    }
  }
  return true;
}

bool check_logits(Op& op, const float* logits, int64_t sequences, int64_t n) {
  auto* broken = op.scratch<int64_t>(sequences);
  if (broken == nullptr) return false;
  op.parallel(sequences, n, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const float* own = logits + b * n;
      const auto is_broken = [](float v) { return std::isnan(v) || v == -kLowest; };
      broken[b] = std::find_if(own, own + n, is_broken) - own;
    }
  });
  for (int64_t b = 0; b < sequences; ++b) {
    if (broken[b] < n) {
      return op.fail("logits: token %lld of sequence %lld has %g", (long long)broken[b],
                     (long long)b, logits[b * n + broken[b]]);
    }
  }
  return true;
}

}  // namespace

void sample(Op& op, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& seed, const Tensor& positions, Tensor& out) {
  if (!op.check("logits", logits, {ScalarType::Float}, {kAny, kAny})) return;
  const int64_t sequences = logits.size(0), n = logits.size(1);
  if (!op.check("temperature", temperature, {ScalarType::Float}, {sequences}) ||
      !op.check("top_k", top_k, {ScalarType::Long}, {sequences}) ||
      !op.check("top_p", top_p, {ScalarType::Float}, {sequences}) ||
      !op.check("seed", seed, {ScalarType::Long}, {sequences}) ||
      !op.check("positions", positions, {ScalarType::Long}, {sequences}) ||
      !op.output("out", out, ScalarType::Long, {sequences, 1})) {
    return;
  }
  if (n < 1) return void(op.fail("logits: the vocabulary is empty"));
  const float* data = logits.const_data_ptr<float>();
  const Parameters parameters{temperature.const_data_ptr<float>(), top_p.const_data_ptr<float>(),
                              top_k.const_data_ptr<int64_t>(), seed.const_data_ptr<int64_t>(),
                              positions.const_data_ptr<int64_t>()};
  Draw* draws = op.scratch<Draw>(sequences);
  if (draws == nullptr || !check_parameters(op, parameters, sequences) ||
      !check_logits(op, data, sequences, n)) {
    return;
  }
  for (int64_t b = 0; b < sequences; ++b) {
    draws[b] = {data + b * n, parameters.temperature[b], kLowest,
                static_cast<uint64_t>(parameters.seed[b]),
                static_cast<uint32_t>(parameters.position[b])};
  }
  if (!filter(op, parameters, sequences, n, draws)) return;
  draw_tokens(op, draws, sequences, n, out.mutable_data_ptr<int64_t>());
}

}  // namespace et_moe::cpu
