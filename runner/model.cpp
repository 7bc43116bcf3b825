#include "runner/model.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "runner/errors.h"

namespace et_moe {
namespace {

/// Tokens for which a call that may be followed by others at once takes pages in advance.
constexpr size_t kTokensAhead = 16;

}  // namespace

Session::~Session() {
  model_.drop(*this);
  model_.pool_->slots.give(slot_);
}

std::unique_ptr<Session> Model::new_session() {
  if (pool_->slots.size() == 0) {
    throw std::runtime_error("all sequences are in use");
  }
  std::unique_ptr<Session> session(new Session(*this, pool_->slots.take()));
  device_->clear_slot(session->slot_);
  return session;
}

void Model::drop(Session& session) {
  // A call that runs ahead on its state ends before anything that the device is asked from now on.
  std::replace(ahead_.begin(), ahead_.end(), &session, static_cast<Session*>(nullptr));
  for (const int32_t page : session.pages_) pool_->pages.give(page);
  session.pages_.clear();
}

void Model::reset(Session& session) {
  drop(session);
  device_->clear_slot(session.slot_);
  session.position_ = 0;
  session.tokens_.clear();
  session.overtaken_.reset();
  session.failed_ = false;
}

void Model::check_call(const Session& session, const int64_t* tokens, size_t count) const {
  if (session.failed_) {
    throw std::runtime_error("the session's last call failed: reset it before another");
  }
  if (count == 0 || count > static_cast<size_t>(info_.max_prefill_tokens)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_prefill_tokens) +
                             " tokens, got " + std::to_string(count));
  }
  for (size_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= info_.vocab_size) {
      throw std::runtime_error("token id " + std::to_string(tokens[i]) +
                               " is outside the vocabulary of " + std::to_string(info_.vocab_size));
    }
  }
  const int64_t length = session.position_ + static_cast<int64_t>(count);
  if (length > info_.max_seq_len) {
    throw std::runtime_error(std::to_string(length) + " tokens do not fit the context of " +
                             std::to_string(info_.max_seq_len));
  }
}

bool Model::has_page(const Session& session, int64_t position) const {
  return position < static_cast<int64_t>(session.pages_.size()) * info_.page_size;
}

size_t Model::missing_pages(const Session& session, size_t count) const {
  const auto size = static_cast<size_t>(info_.page_size);
  const size_t wanted = (static_cast<size_t>(session.position_) + count + size - 1) / size;
  return wanted - std::min(wanted, session.pages_.size());
}

void Model::take_pages(const std::vector<Feed>& feeds, size_t count, bool run_ahead) {
  size_t missing = 0;
  for (const Feed& feed : feeds) missing += missing_pages(*feed.session, count);
  if (missing > free_pages()) {
    throw OutOfPages("the KV cache has " + std::to_string(free_pages()) + " free pages of " +
                     std::to_string(pages()) + ", " + std::to_string(missing) + " are needed");
  }
  if (cache_) cache_->make_room(missing);
  for (const size_t more : {size_t{0}, run_ahead ? kTokensAhead : 0}) {
    for (const Feed& feed : feeds) {
      const auto room = static_cast<size_t>(info_.max_seq_len - feed.session->position_);
      size_t wanted = missing_pages(*feed.session, std::min(count + more, room));
      for (; wanted > 0 && pool_->pages.size() > 0; --wanted) {
        feed.session->pages_.push_back(pool_->pages.take());
      }
    }
  }
}

Model::Reuse Model::reuse(Session& session, const std::vector<int64_t>& tokens, size_t limit) {
  if (!cache_) return {};
  const PrefixCache::Match match = cache_->find(tokens, limit);
  if (!match.slot) return {0, match.known};
  for (const int32_t page : match.pages) pool_->pages.hold(page);
  device_->copy_slot(*match.slot, session.slot_);
  const size_t count = match.pages.size() * static_cast<size_t>(info_.page_size);
  session.pages_ = match.pages;
  session.tokens_.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(count));
  session.position_ = static_cast<int64_t>(count);
  return {count, match.known};
}

void Model::remember(const Session& session, bool passing) {
  if (!cache_ || (passing && session.position_ % info_.page_size != 0)) return;
  if (const auto slot = cache_->add(session.tokens_, session.pages_, passing)) {
    device_->copy_slot(session.slot_, *slot);
  }
}

bool Model::is_ahead(const std::vector<Feed>& feeds) const {
  return std::equal(feeds.begin(), feeds.end(), ahead_.begin(), ahead_.end(),
                    [](const Feed& feed, const Session* session) {
                      return feed.session == session && feed.token == session->drawn_ &&
                             feed.sampling == session->sampling_;
                    });
}

void Model::settle() {
  if (ahead_.empty()) return;
  const std::vector<Session*> sessions = std::exchange(ahead_, {});
  const std::vector<int64_t> tokens = device_->settle();
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (sessions[i]) sessions[i]->overtaken_ = tokens[i];
  }
}

void Model::check_drawn(const int64_t* tokens, size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    if (static_cast<uint64_t>(tokens[i]) < static_cast<uint64_t>(info_.vocab_size)) continue;
    throw std::runtime_error(both_files(program_.path(), weights_->path()) + ": the token " +
                             std::to_string(tokens[i]) + " is drawn, expected 0 to " +
                             std::to_string(info_.vocab_size - 1));
  }
}

void Model::check_logits(const float* logits, size_t sequences) const {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto size = static_cast<size_t>(info_.vocab_size);
  for (const float* row = logits; row != logits + sequences * size; row += size) {
    int broken = 0;  // no search: this is what a compiler makes vectors of
    for (size_t i = 0; i < size; ++i) broken |= !(row[i] < kInfinity);
    if (broken == 0) continue;
    const float* first = std::find_if(row, row + size, [](float v) { return !(v < kInfinity); });
    throw std::runtime_error(both_files(program_.path(), weights_->path()) +
                             ": the logit of token " + std::to_string(first - row) + " is " +
                             std::to_string(*first));
  }
}

void Model::check_overtaken(Session& session, int64_t token, const Sampling& sampling) const {
  if (!session.overtaken_) return;
  if (token != session.drawn_ || !(sampling == session.sampling_)) {
    throw std::runtime_error(
        "the session has gone on from the token it drew, as it was asked to: reset it before "
        "another call");
  }
  session.failed_ = true;
  check_drawn(&*session.overtaken_, 1);
  session.failed_ = false;
}

void Model::take_overtaken(Session& session) {
  if (cache_) session.tokens_.push_back(session.drawn_);
  session.drawn_ = *session.overtaken_;
  session.overtaken_.reset();
  ++session.position_;
}

std::vector<const void*> Model::run_or_settle(const Call& call, size_t sequences) {
  try {
    std::vector<const void*> outputs = device_->run(call);
    check_drawn(static_cast<const int64_t*>(outputs[0]), sequences);
    if (outputs.size() > 1) check_logits(static_cast<const float*>(outputs[1]), sequences);
    return outputs;
  } catch (...) {
    try {
      device_->settle();  // the call that failed may have been followed by another
    } catch (const std::exception&) {
      // What matters is why the first one failed.
    }
    throw;
  }
}

std::vector<Step> Model::call(const std::vector<Feed>& feeds, const int64_t* tokens, size_t count,
                              const CallOptions& options) {
  static const std::vector<std::string> token_only{kToken}, with_logits{kToken, kLogits};
  std::vector<TextRow> rows;
  bool run_ahead = options.run_ahead;
  for (size_t i = 0; i < feeds.size(); ++i) {
    Session& session = *feeds[i].session;
    const int64_t next = session.position_ + static_cast<int64_t>(count);
    // The next call would take its pages from this one, and write over what is to be remembered.
    run_ahead = run_ahead && next < info_.max_seq_len && has_page(session, next) &&
                (!cache_ || next % info_.page_size != 0);
    rows.push_back(
        {tokens + i * count, session.position_, session.slot_, session.pages_, feeds[i].sampling});
  }
  inputs_->set(rows, count);
  const std::string& method = count > 1 ? kPrefill : feeds.size() > 1 ? kDecodeBatch : kDecode;
  for (const Feed& feed : feeds) feed.session->failed_ = true;
  ahead_.clear();
  const std::vector<const void*> outputs = run_or_settle(
      {method, inputs_->inputs(), options.logits ? with_logits : token_only, run_ahead},
      feeds.size());
  std::vector<Step> steps;
  for (size_t i = 0; i < feeds.size(); ++i) {
    const auto row = static_cast<std::ptrdiff_t>(i);
    const float* logits =
        options.logits ? static_cast<const float*>(outputs[1]) + row * info_.vocab_size : nullptr;
    Session& session = *feeds[i].session;
    session.failed_ = false;
    session.position_ += static_cast<int64_t>(count);
    session.drawn_ = static_cast<const int64_t*>(outputs[0])[row];
    session.sampling_ = feeds[i].sampling;
    if (cache_)
      session.tokens_.insert(session.tokens_.end(), rows[i].tokens, rows[i].tokens + count);
    if (options.remember) remember(session, count == 1);
    if (run_ahead) ahead_.push_back(&session);
    steps.push_back({session.drawn_, logits});
  }
  return steps;
}

Step Model::run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
                const CallOptions& options) {
  check_call(session, tokens, count);
  if (count > 1) {
    settle();
    check_overtaken(session, tokens[0], session.sampling_);
    if (session.overtaken_) {
      take_overtaken(session);
      ++tokens;
      --count;
    }
  }
  const Feed feed{&session, tokens[0], sampling};
  if (count == 1) return decode({feed}, options).front();
  take_pages({feed}, count, false);
  CallOptions without_next = options;
  without_next.run_ahead = false;  // a next call would be one of another method
  return call({feed}, tokens, count, without_next).front();
}

std::vector<Step> Model::decode(const std::vector<Feed>& feeds, const CallOptions& options) {
  if (feeds.empty() || feeds.size() > static_cast<size_t>(info_.max_sequences)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_sequences) +
                             " sequences, got " + std::to_string(feeds.size()));
  }
  for (const Feed& feed : feeds) check_call(*feed.session, &feed.token, 1);
  if (!is_ahead(feeds)) settle();
  std::vector<Feed> rest;
  for (const Feed& feed : feeds) {
    check_overtaken(*feed.session, feed.token, feed.sampling);
    if (!feed.session->overtaken_) rest.push_back(feed);
  }
  std::vector<Step> made;
  if (!rest.empty()) {
    if (ahead_.empty()) take_pages(rest, 1, options.run_ahead);
    CallOptions now = options;
    now.run_ahead = options.run_ahead && rest.size() == feeds.size();
    std::vector<int64_t> tokens;
    for (const Feed& feed : rest) tokens.push_back(feed.token);
    made = call(rest, tokens.data(), 1, now);
  }
  std::vector<Step> steps;
  auto next = made.begin();
  for (const Feed& feed : feeds) {
    Session& session = *feed.session;
    if (!session.overtaken_) {
      steps.push_back(*next++);
      continue;
    }
    take_overtaken(session);
    steps.push_back({session.drawn_, nullptr});
  }
  return steps;
}

}  // namespace et_moe
