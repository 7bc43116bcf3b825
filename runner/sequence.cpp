#include "runner/sequence.h"

#include <algorithm>
#include <utility>

namespace et_moe {
namespace {

bool contains(const std::vector<int64_t>& ids, int64_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

Sequence::Sequence(uint64_t id, Request request, std::unique_ptr<Session> session, Model& model)
    : id_(id), request_(std::move(request)), session_(std::move(session)), model_(model) {
  const ModelInfo& info = model_.info();
  // The last token drawn needs no room in the context.
  const int64_t room = info.max_seq_len - static_cast<int64_t>(request_.prompt_ids.size()) + 1;
  limit_ = std::min(request_.params.max_tokens.value_or(room), room);
  if (request_.params.need_host()) {
    sampler_.emplace(request_.params, info.vocab_size, request_.prompt_ids);
  }
}

Step Sequence::feed_prompt() {
  const std::vector<int64_t>& ids = request_.prompt_ids;
  const SamplingParams& params = request_.params;
  // Only the last token of a call has logits.
  const auto most = params.prompt_logprobs ? 1 : model_.info().max_prefill_tokens;
  const size_t count = std::min(static_cast<size_t>(most), ids.size() - fed_);
  const bool is_last = fed_ + count == ids.size();
  CallOptions options;
  options.logits = is_last ? sampler_ || params.logprobs : params.prompt_logprobs.has_value();
  const Step step = model_.run(*session_, ids.data() + fed_, count, params.sampling, options);
  fed_ += count;
  if (params.prompt_logprobs && !is_last) {
    prompt_logprobs_.push_back(
        token_logprob(step.logits, model_.info().vocab_size, ids[fed_], *params.prompt_logprobs));
  }
  return step;
}

Step Sequence::feed_token(bool alone) {
  CallOptions options;
  options.logits = sampler_ || request_.params.logprobs;
  options.run_ahead = alone && !options.logits && drawn_ + 1 < limit_;
  return model_.run(*session_, &token_, 1, request_.params.sampling, options);
}

int64_t Sequence::draw(const float* logits) {
  const int64_t token = sampler_->draw(logits, session_->position() - 1, mask_ ? &*mask_ : nullptr);
  sampler_->add(token);
  mask_.reset();
  return token;
}

void Sequence::accept(int64_t token, const float* logits, Event& event) {
  const SamplingParams& params = request_.params;
  token_ = token;
  ++drawn_;
  event.token_ids.push_back(token);
  if (params.logprobs) {
    event.logprobs.push_back(
        token_logprob(logits, model_.info().vocab_size, token, *params.logprobs));
  }
  const bool is_eos = !params.ignore_eos && contains(model_.info().eos_ids, token);
  if (is_eos || contains(params.stop_token_ids, token)) {
    event.end = RequestEnd::kStop;
  } else if (drawn_ == limit_) {
    event.end = RequestEnd::kLength;
  }
}

Event Sequence::step(bool alone) {
  Event event{id_, {}, {}, {}, {}, {}};
  if (!logits_.empty()) {
    const std::vector<float> logits = std::exchange(logits_, {});
    accept(draw(logits.data()), logits.data(), event);
    return event;
  }
  if (fed_ == 0) model_.reset(*session_);
  const Step step = in_prompt() ? feed_prompt() : feed_token(alone);
  if (in_prompt()) return event;
  if (drawn_ == 0 && request_.params.prompt_logprobs) {
    event.prompt_logprobs = std::move(prompt_logprobs_);
  }
  if (limit_ == 0) {
    event.end = RequestEnd::kLength;
  } else if (!sampler_) {
    accept(step.token, step.logits, event);
  } else if (request_.params.guided && !mask_) {
    logits_.assign(step.logits, step.logits + model_.info().vocab_size);
  } else {
    accept(draw(step.logits), step.logits, event);
  }
  return event;
}

}  // namespace et_moe
