// The engine: prompts in, tokens out. It knows nothing of flags, files or terminals.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "runner/model.h"
#include "runner/stats.h"

namespace et_moe {

struct GenerationConfig {
  int64_t max_new_tokens = 128;
  Sampling sampling;
};

/// Why a generation ended.
enum class FinishReason {
  kStop,      // an end-of-sequence id was drawn
  kLength,    // max_new_tokens, or the context is full
  kCallback,  // the token callback said so
};

struct Generation {
  std::vector<int64_t> ids;  // all that were drawn; an end-of-sequence id is the last
  FinishReason finish_reason;
};

/// Runs one sequence on a model. Several engines may share a model, taking turns; none of this is
/// thread-safe.
///
/// Every token that was fed or drawn belongs to the sequence, also the one that ended a generation.
/// All of them fit the context, though the last token drawn is fed only with what is appended next.
class Engine {
 public:
  /// Called with each token as it is drawn, an end-of-sequence id included. Returns whether to go
  /// on; false ends the generation after this token.
  using TokenCallback = std::function<bool(int64_t id)>;
  /// Called with the logits (vocab_size floats) that predict the token at index `i`.
  using LogitsCallback = std::function<void(size_t i, const float* logits)>;

  explicit Engine(std::shared_ptr<Model> model);

  /// Starts a new sequence with `prompt` and generates: `reset`, then `append`, but for a
  /// max_new_tokens of 0, which is refused.
  Generation generate(const std::vector<int64_t>& prompt, const GenerationConfig& config,
                      llm::Stats& stats, const TokenCallback& on_token);

  /// Starts a new sequence, without a token yet.
  void reset();

  /// Feeds `ids` behind the tokens of the sequence and generates until an end-of-sequence id,
  /// max_new_tokens, a full context, or the callback's word. With a max_new_tokens of 0 it feeds
  /// only. Fills the stats from inference_start_ms on, which the caller sets; num_prompt_tokens is
  /// the number of `ids`.
  ///
  /// Greedy tokens are those of one prompt with all tokens of the sequence where the arithmetic is
  /// the same: prompts are fed in pieces, and their sums may be rounded in another order.
  ///
  /// Throws std::runtime_error: no ids, more tokens than the context holds, an id outside the
  /// vocabulary, sampling parameters out of range; the sequence is as it was before. After a
  /// failure of the program it has to be reset. An exception of the callback ends the generation
  /// after its token and is passed on.
  Generation append(const std::vector<int64_t>& ids, const GenerationConfig& config,
                    llm::Stats& stats, const TokenCallback& on_token);

  /// Teacher-forced: starts a new sequence, feeds `ids`, as many in a call as the program's method
  /// `score` takes or one by one without it, and reports the logits that predict ids[1], ids[2],
  /// ... The sequence then has all but the last. Throws like `check_score`, and for a failure of
  /// the program.
  void score(const std::vector<int64_t>& ids, const LogitsCallback& on_logits);

  /// Throws std::runtime_error unless `ids` can be scored: fewer than two, more than the context
  /// holds and one, an id outside the vocabulary.
  void check_score(const std::vector<int64_t>& ids) const;

  const Model& model() const { return *model_; }

 private:
  void check(const std::vector<int64_t>& ids, const GenerationConfig& config) const;
  /// Feeds the tokens that are not fed yet, piece by piece; returns the step of the last piece.
  Step prefill(const Sampling& sampling, llm::Stats& stats);
  /// Takes tokens that were drawn, up to the one that ends the generation, and takes back those
  /// behind it. Returns whether the generation goes on.
  bool take(const std::vector<int64_t>& drawn, int64_t limit, const TokenCallback& on_token,
            Generation& generation);
  /// Draws up to `limit` tokens, of which `first` is the first, with drafts if the program has
  /// them.
  Generation decode(int64_t first, int64_t limit, const Sampling& sampling, llm::Stats& stats,
                    const TokenCallback& on_token);

  std::shared_ptr<Model> model_;
  std::unique_ptr<Session> session_;
  /// All of the sequence. Those behind the session's position are fed with what comes next: the
  /// last one drawn, or all, once the device has gone on from drafts that turned out to be none.
  std::vector<int64_t> tokens_;
};

/// log softmax(logits)[id], computed in double. `logits` has `vocab_size` entries.
double log_probability(const float* logits, int64_t vocab_size, int64_t id);

}  // namespace et_moe
