// The engine: prompts in, tokens out. It knows nothing of flags, files or terminals.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "runner/model.h"
#include "runner/stats.h"

namespace et_moe {

struct GenerationConfig {
  int64_t max_new_tokens = 128;
  Sampling sampling;
};

/// Runs one session on a model. Several engines may share a model, taking turns.
class Engine {
 public:
  /// Called with each token as it is drawn, an end-of-sequence id included.
  using TokenCallback = std::function<void(int64_t id)>;
  /// Called with the logits (vocab_size floats) that predict the token at index `i`.
  using LogitsCallback = std::function<void(size_t i, const float* logits)>;

  explicit Engine(std::shared_ptr<Model> model);

  /// Starts a new sequence with `prompt` and generates until an end-of-sequence id, max_new_tokens,
  /// or a full context. Returns the generated ids (an end-of-sequence id is the last). Fills the
  /// stats from inference_start_ms on, which the caller sets.
  /// Throws std::runtime_error: an empty prompt, one longer than the context, an id outside the
  /// vocabulary, sampling parameters out of range.
  std::vector<int64_t> generate(const std::vector<int64_t>& prompt, const GenerationConfig& config,
                                llm::Stats& stats, const TokenCallback& on_token);

  /// Teacher-forced: starts a new sequence, feeds `ids` one by one and reports the logits that
  /// predict ids[1], ids[2], ... Throws like `generate`; at least two ids.
  void score(const std::vector<int64_t>& ids, const LogitsCallback& on_logits);

  const Model& model() const { return *model_; }

 private:
  /// Feeds a prompt piece by piece; returns the step of the last piece.
  Step prefill(const std::vector<int64_t>& prompt, const Sampling& sampling, llm::Stats& stats);

  std::shared_ptr<Model> model_;
  std::unique_ptr<Session> session_;
};

/// log softmax(logits)[id], computed in double. `logits` has `vocab_size` entries.
double log_probability(const float* logits, int64_t vocab_size, int64_t id);

}  // namespace et_moe
