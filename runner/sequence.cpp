#include "runner/sequence.h"

#include <algorithm>
#include <utility>

#include "runner/stats.h"

namespace et_moe {
namespace {

constexpr size_t kLongPrompt = 1024;  // tokens; one more call for its end is little to it

bool contains(const std::vector<int64_t>& ids, int64_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

size_t bounded_end(size_t begin, size_t end, size_t bound) {
  const size_t short_piece = bound / 4;
  if (end - begin <= bound) return end;
  size_t cut = (begin / bound + 1) * bound;
  if (cut - begin <= short_piece) cut += bound;
  return cut + short_piece < end ? cut : end;
}

Sequence::Sequence(uint64_t id, Request request, Model& model)
    : id_(id), request_(std::move(request)), model_(model) {
  const ModelInfo& info = model_.info();
  const int64_t room = info.max_seq_len - static_cast<int64_t>(request_.prompt_ids.size());
  limit_ = std::min(request_.params.max_tokens.value_or(room), room);
}

void Sequence::begin(std::unique_ptr<Session> session) {
  session_ = std::move(session);
  if (request_.params.need_host() && !sampler_) {
    sampler_.emplace(request_.params, model_.info().vocab_size, request_.prompt_ids);
  }
}

void Sequence::put_back() {
  session_.reset();
  fed_ = replayed_ = 0;
  looked_up_ = false;
  logits_.clear();
  prompt_logprobs_.clear();
}

void Sequence::reuse_prefix() {
  // A prompt whose log-probabilities are wanted is fed whole.
  if (std::exchange(looked_up_, true) || request_.params.prompt_logprobs) return;
  const std::vector<int64_t>& prompt = request_.prompt_ids;
  std::vector<int64_t> tokens(prompt);
  tokens.insert(tokens.end(), ids_.begin(), ids_.end());
  // The last token is fed: what follows it is not known, or its logits are not.
  const auto [count, known] = model_.reuse(*session_, tokens, tokens.size() - 1);
  fed_ = std::min(count, prompt.size());
  replayed_ = count - fed_;
  known_ = known;
  if (ids_.empty()) cached_ = count;
}

size_t Sequence::piece_end() const {
  const auto most = static_cast<size_t>(model_.info().max_prefill_tokens);
  const auto page = static_cast<size_t>(model_.info().page_size);
  const size_t size = request_.prompt_ids.size();
  if (request_.params.prompt_logprobs) {
    // Without a method for it only the last token of a call has logits.
    return std::min(size, fed_ + std::max<size_t>(1, most_scored()));
  }
  // Pieces end where they would without a prefix that is reused, at the last full page of a long
  // prompt, and where other prompts have gone other ways.
  size_t end = std::min(size, most % page == 0 ? (fed_ / most + 1) * most : fed_ + most);
  for (const size_t stop : {size >= kLongPrompt ? size / page * page : 0, known_}) {
    if (fed_ < stop && stop < end) end = stop;
  }
  return end;
}

size_t Sequence::next_count() const { return bounded_end(fed_, piece_end(), bound_) - fed_; }

size_t Sequence::pages_to_go_on() const {
  const auto size = static_cast<size_t>(model_.info().page_size);
  const size_t before = request_.prompt_ids.size() + model_.decode_tokens(drafts()) - 1;
  const size_t fed = before + ids_.size();
  const size_t at_end = before + static_cast<size_t>(std::max<int64_t>(limit_, 1)) - 1;
  return std::min((fed + size - 1) / size + 1, (std::max(at_end, fed) + size - 1) / size);
}

Event Sequence::feed_prompt() {
  const std::vector<int64_t>& ids = request_.prompt_ids;
  const SamplingParams& params = request_.params;
  const int64_t vocabulary = model_.info().vocab_size;
  const size_t count = next_count(), end = fed_ + count;
  const bool is_last = end == ids.size();
  CallOptions options;
  options.full_logits = params.prompt_logprobs && most_scored() > 0;
  options.logits = is_last ? wants_logits() : params.prompt_logprobs.has_value();
  options.remember = remembers() && end == piece_end();
  if (options.full_logits) {
    // Of these short pieces only the one that ends with the last full page leaves a snapshot.
    const auto page = static_cast<size_t>(model_.info().page_size);
    options.remember = end / page == ids.size() / page;
  }
  const Step step = model_.run(*session_, ids.data() + fed_, count, params.sampling, options);
  const size_t rows = options.full_logits ? count : 1;  // of logits, the last behind the last token
  const auto row = [&](size_t i) { return step.logits + i * static_cast<size_t>(vocabulary); };
  for (size_t i = 0; params.prompt_logprobs && i < rows; ++i) {
    const size_t next = end - rows + i + 1;
    if (next == ids.size()) break;
    prompt_logprobs_.push_back(
        token_logprob(row(i), vocabulary, ids[next], *params.prompt_logprobs));
  }
  fed_ = end;
  Event event = empty_event();
  if (is_last) advance(step.tokens[0], step.logits ? row(rows - 1) : nullptr, event);
  return event;
}

Event Sequence::take(const Step& step) {
  Event event = empty_event();
  for (size_t i = 0; i < step.tokens.size() && !event.end; ++i) {
    const int64_t token = step.tokens[i];
    if (++replayed_ < ids_.size() && token != ids_[replayed_]) {
      // Computed in another way than at first, it would be another token: what was drawn holds.
      model_.take_back(*session_, step.tokens.size() - 1 - i);
      return event;
    }
    advance(token, step.logits, event);
  }
  if (!event.drawn_ms.empty()) {
    std::fill(event.drawn_ms.begin(), event.drawn_ms.end(), event.drawn_ms.back());
  }
  // Tokens that are drawn once more were counted; drafts behind the last one come to nothing.
  if (const size_t kept = event.token_ids.size(); kept > 0) {
    event.drafts.add(step.drafts, std::min(kept, step.tokens.size() - 1));
  }
  return event;
}

int64_t Sequence::draw(const float* logits) {
  const int64_t token = sampler_->draw(logits, session_->position() - 1, mask_ ? &*mask_ : nullptr);
  sampler_->add(token);
  mask_.reset();
  return token;
}

void Sequence::accept(int64_t token, const float* logits, Event& event) {
  const SamplingParams& params = request_.params;
  if (ids_.empty()) event.cached_tokens = static_cast<int64_t>(cached_);
  ids_.push_back(token);
  event.token_ids.push_back(token);
  event.drawn_ms.push_back(llm::now_ms());
  if (params.logprobs) {
    event.logprobs.push_back(
        token_logprob(logits, model_.info().vocab_size, token, *params.logprobs));
  }
  const bool is_eos = !params.ignore_eos && contains(model_.info().eos_ids, token);
  if (is_eos || contains(params.stop_token_ids, token)) {
    event.end = RequestEnd::kStop;
  } else if (static_cast<int64_t>(ids_.size()) == limit_) {
    event.end = RequestEnd::kLength;
  }
}

Event Sequence::draw_waiting() {
  Event event = empty_event();
  const std::vector<float> logits = std::exchange(logits_, {});
  accept(draw(logits.data()), logits.data(), event);
  return event;
}

void Sequence::advance(int64_t token, const float* logits, Event& event) {
  if (replayed_ < ids_.size()) return;
  if (ids_.empty() && request_.params.prompt_logprobs) {
    event.prompt_logprobs = std::move(prompt_logprobs_);
  }
  if (limit_ == 0) {
    event.cached_tokens = static_cast<int64_t>(cached_);
    event.end = RequestEnd::kLength;
  } else if (!sampler_) {
    accept(token, logits, event);
  } else if (request_.params.guided && !mask_) {
    logits_.assign(logits, logits + model_.info().vocab_size);
  } else {
    accept(draw(logits), logits, event);
  }
}

}  // namespace et_moe
