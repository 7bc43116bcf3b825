#include "runner/request.h"

#include <charconv>
#include <cmath>

namespace et_moe {
namespace {

// Below it, logits / temperature could leave the range of float32.
constexpr float kLowestTemperature = 1e-5f;

template <typename Value>
void require(bool condition, const char* name, Value value, const std::string& expected) {
  if (condition) return;
  // Not rounded: 1.0000001 is no 1.
  char text[32];
  const auto [end, _] = std::to_chars(text, text + sizeof text, value);
  throw InvalidRequest(std::string(name) + " " + std::string(text, end) + ": expected " + expected);
}

void require_finite(const char* name, float value) {
  require(std::isfinite(value), name, value, "a finite number");
}

void require_count(const char* name, const std::optional<int64_t>& value, int64_t most) {
  if (!value) return;
  require(*value >= 0 && *value <= most, name, *value, "0 to " + std::to_string(most));
}

}  // namespace

void check_length(size_t count, size_t before, bool is_answered, int64_t max_seq_len) {
  if (count == 0) throw InvalidRequest("the prompt is empty");
  const auto room = max_seq_len - static_cast<int64_t>(before + count);
  if (room > 0 || (room == 0 && !is_answered)) return;
  const std::string held = before ? " after " + std::to_string(before) + " in the sequence" : "";
  throw InvalidRequest("the prompt has " + std::to_string(count) + " tokens" + held +
                       ", the context of the program holds " + std::to_string(max_seq_len) +
                       (is_answered ? ", of which the answer needs one at least" : ""));
}

void check_ids(const std::vector<int64_t>& ids, int64_t vocab_size, const std::string& what) {
  for (const int64_t id : ids) {
    if (id >= 0 && id < vocab_size) continue;
    throw InvalidRequest(what + "token id " + std::to_string(id) +
                         " is outside the vocabulary of " + std::to_string(vocab_size));
  }
}

void check(const Sampling& s) {
  const bool in_range = s.temperature >= kLowestTemperature && std::isfinite(s.temperature);
  require(s.temperature == 0 || in_range, "temperature", s.temperature,
          "0 (greedy) or at least 1e-5");
  require(s.top_k >= 0, "top_k", s.top_k, "0 (off) or more");
  require(s.top_p > 0 && s.top_p <= 1, "top_p", s.top_p, "more than 0 and at most 1");
}

void check(const SamplingParams& p, int64_t vocab_size) {
  check(p.sampling);
  if (p.max_tokens) require(*p.max_tokens >= 0, "max_tokens", *p.max_tokens, "at least 0");
  require(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "0 to 1");
  require_finite("presence_penalty", p.presence_penalty);
  require_finite("frequency_penalty", p.frequency_penalty);
  require(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty), "repetition_penalty",
          p.repetition_penalty, "a finite number above 0");
  for (const auto& [id, bias] : p.logit_bias) {
    check_ids({id}, vocab_size, "logit_bias: ");
    require_finite("logit_bias", bias);
  }
  check_ids(p.stop_token_ids, vocab_size, "stop_token_ids: ");
  require_count("logprobs", p.logprobs, vocab_size);
  require_count("prompt_logprobs", p.prompt_logprobs, vocab_size);
}

}  // namespace et_moe
