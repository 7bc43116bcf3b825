// The inputs of a text model's methods, by name: which there may be, and their values.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backends/bindings.h"
#include "runner/call.h"

namespace et_moe {

/// Methods of a text model: several tokens of one sequence, one token, and one of each of several
/// sequences. All return `token` and `logits`.
inline const std::string kPrefill = "prefill", kDecode = "decode", kDecodeBatch = "decode_batch";
inline const std::string kToken = "token", kLogits = "logits";

/// A method that a program may have besides: as `prefill`, with the logits behind every token. Its
/// calls have always as many rows, those behind the tokens being padding.
inline const std::string kScore = "score";

/// Methods that a program with drafts has besides: a token and k drafts of those behind it, of one
/// sequence and of each of several. They return `step`.
inline const std::string kDraftDecode = "draft_decode", kDraftDecodeBatch = "draft_decode_batch";
inline const std::string kStep = "step";

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

/// What one sequence is fed in a call.
struct TextRow {
  const int64_t* tokens;
  size_t count;      // of the tokens
  int64_t position;  // how many tokens of the sequence came before
  int64_t version;   // of the state in the slot
  int32_t slot;
  const std::vector<int32_t>& pages;
  const Sampling& sampling;
};

/// Smallest and largest value of a size that varies from call to call.
struct SizeRange {
  int32_t least, most;
};

/// The values of one call after the other, of B sequences with R tokens each, at addresses that
/// stay the same.
///
///   tokens                     int64 [B, R]   token ids
///   positions                  int64 [B]      how many tokens of each sequence came before
///   slots                      int32 [B]      where the recurrent state of each lies
///   pages                      int32 [B, M]   where its KV cache lies; -1 behind its last page
///   num_tokens                 int64 [B]      how many of its tokens are valid
///   versions                   int64 [B]      which version of its state to go on from; only of
///                                             programs with drafts
///   temperature, top_p         float32 [B]    see Sampling
///   top_k, seed                int64 [B]      see Sampling
class TextInputs {
 public:
  /// `max_sequences`: most sequences of a call; `max_tokens`: most tokens of one sequence, where
  /// there is one; `drafts`: most of a sequence, where there are several; `max_pages`: M.
  TextInputs(size_t max_sequences, size_t max_tokens, size_t drafts, size_t max_pages);
  TextInputs(const TextInputs&) = delete;
  TextInputs& operator=(const TextInputs&) = delete;

  /// Throws std::runtime_error, with method and input, unless a method takes these inputs, and no
  /// others, for any number of sequences and tokens in these ranges. A method of one token may do
  /// without `num_tokens`.
  void check(const std::string& method, const MethodSpec& spec, SizeRange sequences,
             SizeRange tokens) const;

  /// Takes memory for the values, once it is known that the methods take so many.
  void allocate();
  /// Sets the values of the next call, of which each row has `width` tokens, those behind its own
  /// padding: at most `max_tokens` of a single one, or 1 + `drafts` of at most `max_sequences`.
  void set(const std::vector<TextRow>& rows, size_t width);

  const std::vector<Input>& inputs() const { return inputs_; }

 private:
  const size_t max_sequences_, max_tokens_, max_pages_;
  std::vector<int64_t> tokens_, positions_, num_tokens_, versions_, top_k_, seed_;
  std::vector<int32_t> slots_, pages_;
  std::vector<float> temperature_, top_p_;
  std::vector<Input> inputs_;  // `tokens` first
};

}  // namespace et_moe
