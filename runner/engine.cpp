#include "runner/engine.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runner/request.h"
#include "runner/sampler.h"

namespace et_moe {
Engine::Engine(std::shared_ptr<Model> model)
    : model_(std::move(model)), session_(model_->new_session()) {}

void Engine::check(const std::vector<int64_t>& ids, const GenerationConfig& config) const {
  const ModelInfo& info = model_->info();
  check_length(ids.size(), tokens_.size(), config.max_new_tokens != 0, info.max_seq_len);
  if (config.max_new_tokens < 0) {
    throw std::runtime_error("max_new_tokens " + std::to_string(config.max_new_tokens) +
                             ": expected at least 0");
  }
  check_ids(ids, info.vocab_size);
  et_moe::check(config.sampling);
}

Step Engine::prefill(const Sampling& sampling, llm::Stats& stats) {
  const auto piece = static_cast<size_t>(model_->info().max_prefill_tokens);
  Step step{};
  for (size_t begin; (begin = static_cast<size_t>(session_->position())) < tokens_.size();) {
    const double start = llm::now_ms();
    step = model_->run(*session_, tokens_.data() + begin, std::min(piece, tokens_.size() - begin),
                       sampling);
    stats.aggregate_model_execution_time_ms += llm::now_ms() - start;
  }
  return step;
}

bool Engine::take(const std::vector<int64_t>& drawn, int64_t limit, const TokenCallback& on_token,
                  Generation& generation) {
  const std::vector<int64_t>& eos_ids = model_->info().eos_ids;
  size_t later = drawn.size();
  // Where drafts were accepted behind the last token, the model has been fed it and more.
  const auto end = [this, &later] {
    if (!model_->take_back(*session_, later)) model_->reset(*session_);
    return false;
  };
  for (const int64_t token : drawn) {
    --later;
    generation.ids.push_back(token);
    tokens_.push_back(token);
    bool go_on = false;
    try {
      go_on = on_token(token);
    } catch (...) {
      end();
      throw;
    }
    if (std::find(eos_ids.begin(), eos_ids.end(), token) != eos_ids.end()) {
      generation.finish_reason = FinishReason::kStop;
      return end();
    }
    if (!go_on) {
      generation.finish_reason = FinishReason::kCallback;
      return end();
    }
  }
  return static_cast<int64_t>(generation.ids.size()) < limit;
}

Generation Engine::decode(int64_t first, int64_t limit, const Sampling& sampling, llm::Stats& stats,
                          const TokenCallback& on_token) {
  Generation generation{{}, FinishReason::kLength};
  CallOptions options;
  options.run_ahead = true;
  options.drafts = model_->info().draft_tokens > 0;
  if (options.drafts) stats.drafts.emplace();
  if (limit == 0) return generation;
  for (bool go_on = take({first}, limit, on_token, generation); go_on;) {
    const double start = llm::now_ms();
    const size_t before = generation.ids.size();
    const Feed feed{session_.get(), tokens_.back(), sampling, limit - static_cast<int64_t>(before)};
    const Step step = model_->decode({feed}, options).front();
    stats.aggregate_model_execution_time_ms += llm::now_ms() - start;
    go_on = take(step.tokens, limit, on_token, generation);
    if (stats.drafts) {
      stats.drafts->add(step.drafts,
                        std::min(generation.ids.size() - before, step.tokens.size() - 1));
    }
  }
  return generation;
}

void Engine::reset() {
  model_->reset(*session_);
  tokens_.clear();
}

Generation Engine::generate(const std::vector<int64_t>& prompt, const GenerationConfig& config,
                            llm::Stats& stats, const TokenCallback& on_token) {
  if (config.max_new_tokens < 1) {
    throw std::runtime_error("max_new_tokens " + std::to_string(config.max_new_tokens) +
                             ": expected at least 1");
  }
  reset();
  return append(prompt, config, stats, on_token);
}

Generation Engine::append(const std::vector<int64_t>& ids, const GenerationConfig& config,
                          llm::Stats& stats, const TokenCallback& on_token) {
  check(ids, config);
  tokens_.insert(tokens_.end(), ids.begin(), ids.end());
  stats.num_prompt_tokens = static_cast<int64_t>(ids.size());
  stats.model_execution_start_ms = llm::now_ms();
  const Step step = prefill(config.sampling, stats);
  stats.prompt_eval_end_ms = stats.first_token_ms = llm::now_ms();
  const int64_t room = model_->info().max_seq_len - session_->position();
  Generation generation = decode(step.tokens[0], std::min(config.max_new_tokens, room),
                                 config.sampling, stats, on_token);
  stats.num_generated_tokens = static_cast<int64_t>(generation.ids.size());
  stats.inference_end_ms = stats.model_execution_end_ms = llm::now_ms();
  stats.gpu = model_->gpu_memory();
  return generation;
}

void Engine::check_score(const std::vector<int64_t>& ids) const {
  if (ids.size() < 2) throw std::runtime_error("scoring needs at least two token ids");
  const ModelInfo& info = model_->info();
  if (static_cast<int64_t>(ids.size()) > info.max_seq_len + 1) {
    throw std::runtime_error(std::to_string(ids.size()) + " tokens do not fit the context of " +
                             std::to_string(info.max_seq_len));
  }
  check_ids(ids, info.vocab_size);
}

void Engine::score(const std::vector<int64_t>& ids, const LogitsCallback& on_logits) {
  check_score(ids);  // the callback looks an id up before it is fed
  reset();
  const ModelInfo& info = model_->info();
  CallOptions options;
  options.full_logits = info.score_tokens > 0;
  options.logits = true;
  const auto piece = static_cast<size_t>(std::max<int64_t>(1, info.score_tokens));
  for (size_t begin = 0; begin + 1 < ids.size();) {
    const size_t count = std::min(piece, ids.size() - 1 - begin);
    const Step step = model_->run(*session_, &ids[begin], count, Sampling(), options);
    // All that was fed counts, even if a callback throws.
    const auto fed = ids.begin() + static_cast<std::ptrdiff_t>(begin);
    tokens_.insert(tokens_.end(), fed, fed + static_cast<std::ptrdiff_t>(count));
    const float* row = step.logits;
    for (const size_t end = begin + count; begin < end; row += info.vocab_size) {
      on_logits(++begin, row);
    }
  }
}

double log_probability(const float* logits, int64_t vocab_size, int64_t id) {
  return logits[id] - log_sum_exp(logits, vocab_size);
}

}  // namespace et_moe
