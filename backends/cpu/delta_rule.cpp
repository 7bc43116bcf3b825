#include "backends/cpu/delta_rule.h"

#include <algorithm>

#include "backends/cpu/floats.h"

namespace et_moe::cpu {

namespace {

// Columns column..column + 8 kVectors of the state (`count` of them if kVectors is 1): columns do
// not depend on each other. k^T S for the next token is summed while S is updated for this one, so
// that S is read and written once a token.
template <int kVectors>
void run_columns(const DeltaRule& rule, int64_t head, int64_t column, int64_t count) {
  const int64_t key_head = head / (rule.heads / rule.key_heads);
  const int64_t key_dim = rule.key_dim, value_dim = rule.value_dim;
  const float* k = rule.k + key_head * key_dim;
  const float* q = rule.q + key_head * key_dim;
  const int64_t at = head * value_dim + column;
  const int64_t place = head * key_dim * value_dim + column;
  const float* old = rule.before + place;
  const auto read = [&](const float* p, int i) {
    return kVectors > 1 ? load(p + i * kLanes) : load(p, count);
  };
  const auto write = [&](float* p, int i, f32x8 v) {
    kVectors > 1 ? store(p + i * kLanes, v) : store(p, v, count);
  };
  f32x8 projected[kVectors] = {};
  for (int64_t j = 0; j < key_dim; ++j) {
    for (int i = 0; i < kVectors; ++i) {
      projected[i] = fma(splat(k[j]), read(old + j * value_dim, i), projected[i]);
    }
  }
  for (int64_t t = 0; t < rule.tokens; ++t) {
    const float* next_k = k + std::min(t + 1, rule.tokens - 1) * rule.key_stride;
    const float* this_k = k + t * rule.key_stride;
    const float* this_q = q + t * rule.key_stride;
    const float decay = rule.decay[t * rule.heads + head];
    const float beta = rule.beta[t * rule.heads + head];
    f32x8 delta[kVectors], out[kVectors] = {};
    for (int i = 0; i < kVectors; ++i) {
      const f32x8 v = read(rule.v + t * rule.value_stride + at, i);
      delta[i] = (v - decay * projected[i]) * beta;
      projected[i] = f32x8{};
    }
    float* fresh = rule.after + t * rule.after_stride + place;
    for (int64_t j = 0; j < key_dim; ++j) {
      for (int i = 0; i < kVectors; ++i) {
        const f32x8 s = fma(splat(this_k[j]), delta[i], read(old + j * value_dim, i) * decay);
        write(fresh + j * value_dim, i, s);
        out[i] = fma(splat(this_q[j]), s, out[i]);
        projected[i] = fma(splat(next_k[j]), s, projected[i]);
      }
    }
    old = fresh;
    for (int i = 0; i < kVectors; ++i) {
      write(rule.out + t * rule.heads * value_dim + at, i, out[i]);
    }
  }
}

}  // namespace

void run_head(const DeltaRule& rule, int64_t head) {
  if (rule.tokens == 0) return;
  constexpr int kVectors = 4;
  int64_t column = 0;
  for (; column + kVectors * kLanes <= rule.value_dim; column += kVectors * kLanes) {
    run_columns<kVectors>(rule, head, column, kVectors * kLanes);
  }
  for (; column < rule.value_dim; column += kLanes) {
    run_columns<1>(rule, head, column, std::min<int64_t>(kLanes, rule.value_dim - column));
  }
}

}  // namespace et_moe::cpu
