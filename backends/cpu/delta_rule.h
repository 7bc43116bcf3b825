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
  const float* decay;   // [tokens, heads]
  const float* beta;    // [tokens, heads]
  const float* before;  // [heads, key_dim, value_dim], the state in front of the first token
  float* after;         // the same, left behind the first token; may be where `before` is
  int64_t
      after_stride;  // from the state left behind a token to the next one's; 0: all in one place
  float* out;        // [tokens, heads, value_dim]
};

// Processes all tokens of one value head.
void run_head(const DeltaRule& rule, int64_t head);

}  // namespace et_moe::cpu
