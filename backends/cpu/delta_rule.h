// The recurrence of the gated delta net, on rows that are floats already.
#pragma once

#include <cstdint>

namespace et_moe::cpu {

// Per token and value head h (key head h / (heads / key_heads)):
//   S <- decay S;  S <- S + k (beta (v - k^T S))^T;  o = q^T S.
struct DeltaRule {
  int64_t tokens, key_heads, heads, key_dim, value_dim;
  const float* q;  // key_heads * key_dim per token, normalised, scaled by key_dim^-0.5
  const float* k;  // the same, normalised
  int64_t key_stride;
  const float* v;  // heads * value_dim per token
  int64_t value_stride;
  const float* decay;  // [tokens, heads]
  const float* beta;   // [tokens, heads]
  float* out;          // [tokens, heads, value_dim]
};

// The rule of `tokens` tokens, those behind `begin` others.
DeltaRule part(const DeltaRule& rule, int64_t begin, int64_t tokens);

// Where a sequence's state lies, [heads, key_dim, value_dim] of float or bf16.
template <class T>
struct DeltaState {
  const T* before;  // in front of the first token
  T* after;         // left behind the first token; may be where `before` is
  int64_t stride;  // from the state left behind a token to the next one's; 0: the last token's only
};

// Whether `run_head` takes memory for a state that is not rounded.
template <class T>
bool needs_exact(int64_t tokens, int64_t stride) {
  return sizeof(T) < sizeof(float) && stride == 0 && tokens > 1;
}

// Processes all tokens of one value head. A state of bf16 is rounded where the contract says so
// (backends/ops/gated_delta_net.py). `exact`: key_dim * value_dim floats, if they are needed.
template <class T>
void run_head(const DeltaRule& rule, const DeltaState<T>& state, int64_t head, float* exact);

}  // namespace et_moe::cpu
