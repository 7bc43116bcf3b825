#include "backends/cpu/delta_rule.h"

#include <algorithm>

#include "backends/cpu/floats.h"
#include "backends/cpu/sequences.h"

namespace et_moe::cpu {

namespace {

f32x8 as_stored(const float*, f32x8 v) { return v; }
f32x8 as_stored(const bf16*, f32x8 v) { return round_to_bf16(v); }

// Columns column..column + 8 kVectors of the state (`count` of them if kVectors is 1): columns do
// not depend on each other. k^T S for the next token is summed while S is updated for this one, so
// that S is read and written once a token. `state` is that of the head.
template <int kVectors, class T>
void run_columns(const DeltaRule& rule, const DeltaState<T>& state, int64_t head, int64_t column,
                 int64_t count) {
  const int64_t key_head = head / (rule.heads / rule.key_heads);
  const int64_t key_dim = rule.key_dim, value_dim = rule.value_dim;
  const float* k = rule.k + key_head * key_dim;
  const float* q = rule.q + key_head * key_dim;
  const int64_t at = head * value_dim + column;
  const T* old = state.before + column;
  const auto read = [&](const auto* p, int i) {
    return kVectors > 1 ? load(p + i * kLanes) : load(p, count);
  };
  const auto write = [&](auto* p, int i, f32x8 v) {
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
    T* fresh = state.after + t * state.stride + column;
    for (int64_t j = 0; j < key_dim; ++j) {
      for (int i = 0; i < kVectors; ++i) {
        const f32x8 s = fma(splat(this_k[j]), delta[i], read(old + j * value_dim, i) * decay);
        write(fresh + j * value_dim, i, s);
        out[i] = fma(splat(this_q[j]), s, out[i]);
        projected[i] = fma(splat(next_k[j]), as_stored(fresh, s), projected[i]);
      }
    }
    old = fresh;
    for (int i = 0; i < kVectors; ++i) {
      write(rule.out + t * rule.heads * value_dim + at, i, out[i]);
    }
  }
}

template <class T>
void run_columns(const DeltaRule& rule, const DeltaState<T>& state, int64_t head) {
  constexpr int kVectors = 4;
  int64_t column = 0;
  for (; column + kVectors * kLanes <= rule.value_dim; column += kVectors * kLanes) {
    run_columns<kVectors>(rule, state, head, column, kVectors * kLanes);
  }
  for (; column < rule.value_dim; column += kLanes) {
    run_columns<1>(rule, state, head, column, std::min<int64_t>(kLanes, rule.value_dim - column));
  }
}

template <class From, class To>
void convert(const From* from, To* to, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t count) { store(to + i, load(from + i, count), count); });
}

}  // namespace

DeltaRule part(const DeltaRule& rule, int64_t begin, int64_t tokens) {
  DeltaRule own = rule;
  own.tokens = tokens;
  own.q += begin * rule.key_stride;
  own.k += begin * rule.key_stride;
  own.v += begin * rule.value_stride;
  own.decay += begin * rule.heads;
  own.beta += begin * rule.heads;
  own.out += begin * rule.heads * rule.value_dim;
  return own;
}

template <class T>
void run_head(const DeltaRule& rule, const DeltaState<T>& state, int64_t head, float* exact) {
  if (rule.tokens == 0) return;
  const int64_t size = rule.key_dim * rule.value_dim;
  const DeltaState<T> own{state.before + head * size, state.after + head * size, state.stride};
  if (!needs_exact<T>(rule.tokens, state.stride)) return run_columns(rule, own, head);
  const T* before = own.before;
  for (int64_t begin = 0; begin < rule.tokens; begin += kPageSize) {
    convert(before, exact, size);
    const DeltaRule rows = part(rule, begin, std::min(kPageSize, rule.tokens - begin));
    run_columns(rows, DeltaState<float>{exact, exact, 0}, head);
    convert(exact, own.after, size);
    before = own.after;
  }
}

template void run_head(const DeltaRule&, const DeltaState<float>&, int64_t, float*);
template void run_head(const DeltaRule&, const DeltaState<bf16>&, int64_t, float*);

}  // namespace et_moe::cpu
