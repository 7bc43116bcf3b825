#include "backends/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backends/cpu/ops.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Of all sequences.
struct Parameters {
  const float *temperature, *top_p;
  const int64_t *top_k, *seed, *position;
};

// How the token behind one row is drawn: it is the one with the largest score.
struct Draw {
  const float* logits;
  float temperature, top_p;
  int64_t top_k;
  float kept;  // the smallest scaled logit that top-k and top-p keep
  uint64_t seed;
  uint32_t position;

  // Whether top-k or top-p may drop any of n tokens.
  bool is_filtered(int64_t n) const {
    return temperature != 0.0f && ((top_k != 0 && top_k < n) || top_p < 1.0f);
  }

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

// Draws a token for each row. Threads share out blocks of all rows' logits.
void draw_tokens(Op& op, const Draw* draws, int64_t rows, int64_t n, int64_t* tokens) {
  constexpr int64_t kBlock = 1024;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  Best* best = op.scratch<Best>(rows * blocks);
  if (best == nullptr) return;
  bool noise = false;
  for (int64_t row = 0; row < rows; ++row) noise |= draws[row].temperature != 0.0f;
  op.parallel(rows * blocks, kBlock * (noise ? 32 : 1), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const Draw draw = draws[item / blocks];
      const int64_t begin = item % blocks * kBlock, end = std::min(n, begin + kBlock);
      best[item] = draw.temperature == 0.0f
                       ? best_of(begin, end, [&](int64_t i) { return draw.logits[i]; })
                       : best_of(begin, end, [&](int64_t i) { return draw.score(i); });
    }
  });
  for (int64_t row = 0; row < rows; ++row) {
    const Best* own = best + row * blocks;
    int64_t winner = 0;
    for (int64_t block = 1; block < blocks; ++block) {
      if (own[block].value > own[winner].value) winner = block;
    }
    tokens[row] = own[winner].index;
  }
}

// Sets `kept` of the rows whose tokens are filtered. Threads share out these rows.
bool filter(Op& op, int64_t rows, int64_t n, Draw* draws) {
  auto* filtered = op.scratch<int64_t>(rows);
  if (filtered == nullptr) return false;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (draws[row].is_filtered(n)) filtered[count++] = row;
  }
  float* heaps = op.scratch<float>(count * n);
  if (heaps == nullptr) return false;
  op.parallel(count, n * 4, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      Draw& draw = draws[filtered[item]];
      float* heap = heaps + item * n;
      for (int64_t i = 0; i < n; ++i) heap[i] = draw.logits[i] / draw.temperature;
      draw.kept = sampling::threshold(heap, n, draw.top_k < n ? draw.top_k : 0, draw.top_p);
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

bool check_logits(Op& op, const float* logits, const Sequences& sequences, int64_t n) {
  auto* broken = op.scratch<int64_t>(sequences.valid);
  if (broken == nullptr) return false;
  op.parallel(sequences.valid, n, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* own = logits + row * n;
      const auto is_broken = [](float v) { return std::isnan(v) || v == -kLowest; };
      broken[row] = std::find_if(own, own + n, is_broken) - own;
    }
  });
  for (int64_t row = 0; row < sequences.valid; ++row) {
    if (broken[row] < n) {
      return op.fail("logits: token %lld of sequence %lld has %g", (long long)broken[row],
                     (long long)sequences.owner[row]->index, logits[row * n + broken[row]]);
    }
  }
  return true;
}

}  // namespace

void sample(Op& op, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& seed, const Tensor& positions, Tensor& out) {
  if (!op.check("logits", logits, {ScalarType::Float}, {kAny, kAny})) return;
  const int64_t rows = logits.size(0), n = logits.size(1);
  if (!op.check("positions", positions, {ScalarType::Long}, {kAny})) return;
  const int64_t count = positions.size(0);
  Sequences sequences;
  if (!read_sequences(op, "logits", rows, count, {}, &sequences) ||
      !op.check("temperature", temperature, {ScalarType::Float}, {count}) ||
      !op.check("top_k", top_k, {ScalarType::Long}, {count}) ||
      !op.check("top_p", top_p, {ScalarType::Float}, {count}) ||
      !op.check("seed", seed, {ScalarType::Long}, {count}) ||
      !op.output("out", out, ScalarType::Long, {count, rows / count})) {
    return;
  }
  if (n < 1) return void(op.fail("logits: the vocabulary is empty"));
  const float* data = logits.const_data_ptr<float>();
  const Parameters parameters{temperature.const_data_ptr<float>(), top_p.const_data_ptr<float>(),
                              top_k.const_data_ptr<int64_t>(), seed.const_data_ptr<int64_t>(),
                              positions.const_data_ptr<int64_t>()};
  Draw* draws = op.scratch<Draw>(rows);
  if (draws == nullptr || !check_parameters(op, parameters, count) ||
      !check_logits(op, data, sequences, n)) {
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Sequence& own = *sequences.owner[row];
    const int64_t b = own.index;
    // In modulo arithmetic, since a program's position may be any number.
    const auto position = static_cast<uint32_t>(parameters.position[b]);
    draws[row] = {data + row * n,
                  parameters.temperature[b],
                  parameters.top_p[b],
                  parameters.top_k[b],
                  kLowest,
                  static_cast<uint64_t>(parameters.seed[b]),
                  position + static_cast<uint32_t>(row - own.row)};
  }
  if (!filter(op, rows, n, draws)) return;
  draw_tokens(op, draws, rows, n, out.mutable_data_ptr<int64_t>());
}

}  // namespace et_moe::cpu
