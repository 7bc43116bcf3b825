// One request that is being served: what it has been fed, what it has drawn, when it ends.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "runner/model.h"
#include "runner/request.h"
#include "runner/sampler.h"

namespace et_moe {

/// Where a piece of a prompt ends that begins at token `begin` and would end at `end`, if pieces
/// are to have about `bound` tokens: at a multiple of it, but for a quarter of it near either end,
/// so that what was one piece falls into none that is much shorter. Programs compute short pieces
/// with other kernels, which may round otherwise; which pieces of any other length a prompt is fed
/// in changes no token.
size_t bounded_end(size_t begin, size_t end, size_t bound);

/// Serves a request on a session: its prompt piece by piece, then token by token. Not thread-safe.
///
/// A sequence that is put back has no session for a while. It then begins anew and makes the calls
/// that it made before, its prompt perhaps cut elsewhere (`bounded_end`), and so comes to the same
/// state; what they draw is known already.
class Sequence {
 public:
  /// The request has been checked.
  Sequence(uint64_t id, Request request, Model& model);

  uint64_t id() const { return id_; }
  /// Gives it a session that has been fed nothing.
  void begin(std::unique_ptr<Session> session);
  /// Gives up its session.
  void put_back();

  /// Whether it has tokens of the prompt to feed.
  bool in_prompt() const { return fed_ < request_.prompt_ids.size(); }
  /// Whether the next token can be drawn once there is a mask.
  bool needs_mask() const { return !logits_.empty() && !mask_; }
  /// Whether a mask can be taken: a guided request has none that is to be used yet.
  bool takes_mask() const { return request_.params.guided && !mask_; }
  void give_mask(TokenMask mask) { mask_ = std::move(mask); }
  /// Whether the next token waits only to be drawn.
  bool can_draw() const { return !logits_.empty() && mask_; }
  /// Whether it takes part in the next decode call.
  bool decodes() const { return !in_prompt() && logits_.empty(); }

  /// Bounds the pieces in which its prompt is fed, see `bounded_end`.
  void bound_pieces(size_t bound) { bound_ = bound; }

  /// Takes over what the prefix cache has of its tokens; before its first call.
  void reuse_prefix();

  /// Pages that it lacks for its next call.
  size_t missing_pages() const { return model_.missing_pages(*session_, next_tokens()); }
  /// Pages that it takes to come to where it is, and one more if it may go on beyond them.
  size_t pages_to_go_on() const;
  /// Those of them that it has.
  size_t pages() const { return session_ ? session_->pages() : 0; }

  /// Feeds a piece of the prompt. Returns what is new. Throws like `Model::run`.
  Event feed_prompt();
  /// Draws the token that waited for its mask. Throws like `Sampler::draw`.
  Event draw_waiting();

  /// What it feeds in a decode call.
  Feed feed() const {
    const int64_t most = limit_ - static_cast<int64_t>(replayed_) - 1;
    // What is drawn once more may differ from what was drawn at first, and the drafts that were
    // accepted behind it are taken back then: no other sequence may have seen them.
    return {session_.get(), ids_[replayed_], request_.params.sampling, most,
            remembers() && !(replays() && drafts())};
  }
  bool wants_logits() const { return sampler_ || request_.params.logprobs; }
  /// Whether its decode calls can be fed drafts.
  bool drafts() const { return model_.info().draft_tokens > 0 && !wants_logits(); }
  /// Whether the decode call that follows the next one can be told from it.
  bool goes_on() const { return !wants_logits() && !replays(); }
  /// Takes what the decode call drew. Returns what is new. Throws like `Sampler::draw`.
  Event take(const Step& step);

 private:
  /// Where the piece of the prompt that comes next ends, unless it has to be shorter.
  size_t piece_end() const;
  /// How many tokens of the prompt the next call feeds.
  size_t next_count() const;
  /// For how many tokens the next call needs pages.
  size_t next_tokens() const { return in_prompt() ? next_count() : model_.decode_tokens(drafts()); }
  /// How many tokens a call can be fed whose logits are all wanted, with a method for that; else 0.
  size_t most_scored() const { return static_cast<size_t>(model_.info().score_tokens); }
  /// Whether the prefix cache may have its pages. A prompt that is fed token by token, for the
  /// logits behind each, is computed in another way than one that goes on from them.
  bool remembers() const { return !request_.params.prompt_logprobs || most_scored() > 0; }
  /// Whether the next call was made before.
  bool replays() const { return replayed_ + 1 < ids_.size(); }
  Event empty_event() const { return {id_, {}, {}, {}, {}, {}}; }
  /// Makes what was drawn behind the last token fed the next token.
  void advance(int64_t token, const float* logits, Event& event);
  /// Draws from the logits of the last call.
  int64_t draw(const float* logits);
  /// The token, its log-probability and whether it is the last.
  void accept(int64_t token, const float* logits, Event& event);

  const uint64_t id_;
  const Request request_;
  std::unique_ptr<Session> session_;
  Model& model_;
  int64_t limit_;                   // most tokens to draw
  std::optional<Sampler> sampler_;  // if the op `sample` does not do
  size_t fed_ = 0;                  // tokens of the prompt
  size_t bound_ = SIZE_MAX;         // of its pieces
  bool looked_up_ = false;          // whether the prefix cache was asked
  size_t known_ = 0;                // tokens that others were fed, too
  size_t cached_ = 0;               // those of the prompt that were not fed again, at the first try
  std::vector<int64_t> ids_;        // that were drawn
  size_t replayed_ = 0;             // how many of them were fed
  std::optional<TokenMask> mask_;   // for the next token
  std::vector<float> logits_;       // of the next token, while it waits for its mask
  std::vector<TokenLogprob> prompt_logprobs_;
};

}  // namespace et_moe
