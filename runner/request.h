// A request to the engine and what comes of it. serving/interface.py says the same in Python.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runner/stats.h"
#include "runner/text_inputs.h"

namespace et_moe {

/// A prompt or a parameter that is refused before anything runs; the message names it.
class InvalidRequest : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// How the tokens of one request are drawn, and when it ends. Names and meaning are those of vLLM
/// and OpenAI.
struct SamplingParams {
  std::optional<int64_t> max_tokens;  // none: as many as the context holds
  Sampling sampling;
  float min_p = 0.0f;               // least probability, relative to the likeliest token's
  float presence_penalty = 0.0f;    // subtracted from logits of tokens that were generated
  float frequency_penalty = 0.0f;   // the same, times how often
  float repetition_penalty = 1.0f;  // divides positive, multiplies negative logits of tokens seen
  std::map<int64_t, float> logit_bias;
  std::vector<int64_t> stop_token_ids;  // besides the program's own end-of-sequence ids
  bool ignore_eos = false;
  std::optional<int64_t> logprobs;         // number of the likeliest tokens beside the drawn one
  std::optional<int64_t> prompt_logprobs;  // the same of the prompt's tokens
  bool guided = false;                     // each token is drawn from a mask that the caller gives

  /// Whether the op `sample` of the program cannot draw what is asked for.
  bool need_host() const {
    return guided || min_p > 0 || presence_penalty != 0 || frequency_penalty != 0 ||
           repetition_penalty != 1 || !logit_bias.empty();
  }
};

struct Request {
  std::vector<int64_t> prompt_ids;
  SamplingParams params;
};

/// These throw InvalidRequest that names the parameter at fault, and what was expected of it.
/// The length of a prompt behind `before` tokens: it must fit the context, with a token of the
/// answer if there is to be one.
void check_length(size_t count, size_t before, bool is_answered, int64_t max_seq_len);
/// Token ids: `what` says whose, at the beginning of the message.
void check_ids(const std::vector<int64_t>& ids, int64_t vocab_size, const std::string& what = "");
void check(const Sampling& sampling);
void check(const SamplingParams& params, int64_t vocab_size);

/// Natural logarithm of a token's probability before temperature and filters.
struct TokenLogprob {
  double logprob;
  std::vector<std::pair<int64_t, double>> top;  // (token id, logprob), likeliest first
};

enum class RequestEnd {
  kStop,       // an end-of-sequence or stop token id was drawn
  kLength,     // max_tokens, or the context is full
  kCancelled,  // by the caller, or since the engine was closed
  kError,
};

/// What became of a request since its last event. The one with an end is its last.
struct Event {
  uint64_t request_id;
  std::vector<int64_t> token_ids;      // drawn since; the id that ended the request is among them
  std::vector<TokenLogprob> logprobs;  // one per token id, if asked for
  std::optional<std::vector<TokenLogprob>> prompt_logprobs;  // once, of all but the first token
  std::optional<RequestEnd> end;
  std::string error;          // with kError
  int64_t cached_tokens = 0;  // of the prompt, taken from the prefix cache; with the first token
  std::vector<double> drawn_ms{};  // when each token was drawn, by llm::now_ms; one time for a step
  llm::DraftStats drafts{};        // that were fed since
};

}  // namespace et_moe
