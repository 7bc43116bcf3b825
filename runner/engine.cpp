#include "runner/engine.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>

namespace et_moe {
namespace {

// Below it, logits / temperature could leave the range of float32.
constexpr float kLowestTemperature = 1e-5f;

void check_sampling(const Sampling& s) {
  const auto fail = [](const char* name, auto value, const char* expected) {
    std::ostringstream message;
    message << name << " " << value << ": expected " << expected;
    throw std::runtime_error(message.str());
  };
  const bool in_range = s.temperature >= kLowestTemperature && std::isfinite(s.temperature);
  if (s.temperature != 0 && !in_range) {
    fail("temperature", s.temperature, "0 (greedy) or at least 1e-5");
  }
  if (s.top_k < 0) fail("top_k", s.top_k, "0 (off) or more");
  if (!(s.top_p > 0 && s.top_p <= 1)) fail("top_p", s.top_p, "more than 0 and at most 1");
}

}  // namespace

Engine::Engine(std::shared_ptr<Model> model)
    : model_(std::move(model)), session_(model_->new_session()) {}

Step Engine::prefill(const std::vector<int64_t>& prompt, const Sampling& sampling,
                     llm::Stats& stats) {
  const auto piece = static_cast<size_t>(model_->info().max_prefill_tokens);
  Step step{};
  for (size_t begin = 0; begin < prompt.size(); begin += piece) {
    const double start = llm::now_ms();
    step = model_->run(*session_, prompt.data() + begin, std::min(piece, prompt.size() - begin),
                       static_cast<int64_t>(begin), sampling);
    stats.aggregate_model_execution_time_ms += llm::now_ms() - start;
  }
  return step;
}

std::vector<int64_t> Engine::generate(const std::vector<int64_t>& prompt,
                                      const GenerationConfig& config, llm::Stats& stats,
                                      const TokenCallback& on_token) {
  const ModelInfo& info = model_->info();
  const auto length = static_cast<int64_t>(prompt.size());
  if (prompt.empty()) throw std::runtime_error("the prompt is empty");
  if (length > info.max_seq_len) {
    throw std::runtime_error("the prompt has " + std::to_string(length) +
                             " tokens, the context of the program holds " +
                             std::to_string(info.max_seq_len));
  }
  if (config.max_new_tokens < 1) {
    throw std::runtime_error("max_new_tokens " + std::to_string(config.max_new_tokens) +
                             ": expected at least 1");
  }
  check_sampling(config.sampling);
  model_->reset(*session_);
  stats.num_prompt_tokens = length;
  stats.model_execution_start_ms = llm::now_ms();
  Step step = prefill(prompt, config.sampling, stats);
  stats.prompt_eval_end_ms = stats.first_token_ms = llm::now_ms();

  // The last token drawn needs no room in the cache.
  const int64_t limit = std::min(config.max_new_tokens, info.max_seq_len - length + 1);
  std::vector<int64_t> generated;
  while (true) {
    generated.push_back(step.token);
    on_token(step.token);
    const bool end =
        std::find(info.eos_ids.begin(), info.eos_ids.end(), step.token) != info.eos_ids.end();
    const auto count = static_cast<int64_t>(generated.size());
    if (end || count >= limit) break;
    const double start = llm::now_ms();
    step = model_->run(*session_, &generated.back(), 1, length + count - 1, config.sampling,
                       /*more=*/count + 1 < limit);
    stats.aggregate_model_execution_time_ms += llm::now_ms() - start;
  }
  stats.num_generated_tokens = static_cast<int64_t>(generated.size());
  stats.inference_end_ms = stats.model_execution_end_ms = llm::now_ms();
  stats.gpu = model_->gpu_memory();
  return generated;
}

void Engine::score(const std::vector<int64_t>& ids, const LogitsCallback& on_logits) {
  if (ids.size() < 2) throw std::runtime_error("scoring needs at least two token ids");
  const ModelInfo& info = model_->info();
  if (static_cast<int64_t>(ids.size()) > info.max_seq_len + 1) {
    throw std::runtime_error(std::to_string(ids.size()) + " tokens do not fit the context of " +
                             std::to_string(info.max_seq_len));
  }
  for (int64_t id : ids) {  // the caller looks an id up before it is fed
    if (id < 0 || id >= info.vocab_size) {
      throw std::runtime_error("token id " + std::to_string(id) + " is outside the vocabulary of " +
                               std::to_string(info.vocab_size));
    }
  }
  model_->want_logits();
  model_->reset(*session_);
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    on_logits(i + 1, model_->run(*session_, &ids[i], 1, static_cast<int64_t>(i), {}).logits);
  }
}

double log_probability(const float* logits, int64_t vocab_size, int64_t id) {
  const double highest = *std::max_element(logits, logits + vocab_size);
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(logits[i] - highest);
  return logits[id] - highest - std::log(sum);
}

}  // namespace et_moe
