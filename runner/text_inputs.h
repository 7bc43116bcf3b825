// The inputs of a text model's methods, by name: which there may be, and their values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backends/bindings.h"
#include "runner/call.h"

namespace et_moe {

/// How the next token is drawn; the op `sample` (backends/ops/sampling.py) defines the meaning.
struct Sampling {
  float temperature = 0.0f;  // 0 is greedy
  int64_t top_k = 0;         // 0 keeps all
  float top_p = 1.0f;        // 1 keeps all
  int64_t seed = 0;

  bool operator==(const Sampling& other) const {
    return temperature == other.temperature && top_k == other.top_k && top_p == other.top_p &&
           seed == other.seed;
  }
};

/// The values of one call after the other, at addresses that stay the same.
///
///   tokens                     int64 [1, T]   token ids of one sequence
///   position                   int64 [1]      how many tokens of the sequence came before
///   num_tokens                 int64 [1]      how many of `tokens` are valid
///   temperature, top_p         float32 [1]    see Sampling
///   top_k, seed                int64 [1]      see Sampling
class TextInputs {
 public:
  /// `max_tokens`: most tokens of a call.
  explicit TextInputs(size_t max_tokens);
  TextInputs(const TextInputs&) = delete;
  TextInputs& operator=(const TextInputs&) = delete;

  /// Throws std::runtime_error, with method and input, unless a method takes these inputs, and no
  /// others, for any number of tokens from `least` to `most`. A method of one token may do without
  /// `num_tokens`.
  void check(const std::string& method, const MethodSpec& spec, int32_t least, int32_t most) const;

  /// Sets the values of the next call; `count` is at most max_tokens.
  void set(const int64_t* tokens, size_t count, int64_t position, const Sampling& sampling);

  const std::vector<Input>& inputs() const { return inputs_; }

 private:
  std::vector<int64_t> tokens_;
  int64_t position_ = 0, num_tokens_ = 0;
  Sampling sampling_;
  std::vector<Input> inputs_;  // `tokens` first
};

}  // namespace et_moe
