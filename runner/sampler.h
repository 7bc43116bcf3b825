// Draws tokens on the host, from logits: what the op `sample` of a program draws, and more.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "runner/request.h"

namespace et_moe {

/// A set of tokens: bit i % 8 of byte i / 8 is token i's, (vocab_size + 7) / 8 bytes.
using TokenMask = std::vector<uint8_t>;

/// The drawing of one request. The noise is a function of seed, position and token alone, as in
/// backends/ops/sampling.py: where nothing is asked for that the op does not know, the token is
/// the one that the op draws on a CPU.
///
/// Logits are changed in vLLM's order: mask, logit bias, repetition, frequency and presence
/// penalty, temperature, min_p, top_k, top_p.
class Sampler {
 public:
  /// `prompt_ids` count as seen, not as generated.
  Sampler(const SamplingParams& params, int64_t vocab_size, const std::vector<int64_t>& prompt_ids);

  /// The next token. `position` is that of the token before it, `logits` has vocab_size floats,
  /// none of them NaN or +infinity; no `mask` allows all tokens. Throws std::runtime_error if no
  /// token is left.
  int64_t draw(const float* logits, int64_t position, const TokenMask* mask);

  /// Counts a token as generated.
  void add(int64_t token) { ++counts_[token]; }

 private:
  void change(const TokenMask* mask);
  int64_t draw_with_noise(int64_t position);

  const SamplingParams params_;
  std::map<int64_t, int64_t> counts_;  // tokens seen -> how often they were generated
  std::vector<float> values_, heap_;   // [vocab_size]
};

/// log(sum(exp(logits))), computed in double.
double log_sum_exp(const float* logits, int64_t vocab_size);

/// The log-probability of a token and of the `top` likeliest ones; of equally likely ones the
/// lowest ids come first.
TokenLogprob token_logprob(const float* logits, int64_t vocab_size, int64_t token, int64_t top);

}  // namespace et_moe
