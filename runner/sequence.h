// One request that is being served: what it has been fed, what it has drawn, when it ends.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "runner/model.h"
#include "runner/request.h"
#include "runner/sampler.h"

namespace et_moe {

/// Serves a request on a session, one call of the model at a time. Not thread-safe.
class Sequence {
 public:
  /// The request has been checked. The session is reset with the first step.
  Sequence(uint64_t id, Request request, std::unique_ptr<Session> session, Model& model);

  uint64_t id() const { return id_; }
  /// Whether the next step feeds tokens of the prompt.
  bool in_prompt() const { return fed_ < request_.prompt_ids.size(); }
  /// Whether the next token can be drawn once there is a mask.
  bool needs_mask() const { return !logits_.empty() && !mask_; }
  /// Whether a mask can be taken: a guided request has none that is to be used yet.
  bool takes_mask() const { return request_.params.guided && !mask_; }
  void give_mask(TokenMask mask) { mask_ = std::move(mask); }

  /// One call of the model, or the drawing of a token that waited for a mask. `alone`: no other
  /// sequence makes a call soon. Returns what is new. Throws std::runtime_error if the call fails.
  Event step(bool alone);

  /// Gives back the session; the sequence is over.
  std::unique_ptr<Session> release() { return std::move(session_); }

 private:
  Step feed_prompt();
  Step feed_token(bool alone);
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
  int64_t drawn_ = 0;               // number of tokens
  int64_t token_ = 0;               // the last one, to be fed next
  std::optional<TokenMask> mask_;   // for the next token
  std::vector<float> logits_;       // of the next token, while it waits for its mask
  std::vector<TokenLogprob> prompt_logprobs_;
};

}  // namespace et_moe
