#include "runner/model.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "runner/errors.h"

namespace et_moe {
namespace {

/// Tokens for which a call that may be followed by others at once takes pages in advance.
constexpr size_t kTokensAhead = 16;

/// The method of a call of so many sequences with so many rows each.
const std::string& method_of(const CallOptions& options, size_t sequences, size_t width) {
  if (sequences > 1) return options.drafts ? kDraftDecodeBatch : kDecodeBatch;
  if (options.drafts) return kDraftDecode;
  if (options.full_logits) return kScore;
  return width > 1 ? kPrefill : kDecode;
}

/// What a call returns.
const std::vector<std::string>& outputs_of(const CallOptions& options) {
  static const std::vector<std::string> step{kStep}, token{kToken}, both{kToken, kLogits};
  if (options.drafts) return step;
  return options.logits || options.full_logits ? both : token;
}

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
  session.position_ = session.version_ = 0;
  session.drafts_.clear();
  session.tokens_.clear();
  session.overtaken_.reset();
  session.failed_ = false;
}

void Model::check_call(const Session& session, const int64_t* tokens, size_t count,
                       int64_t most) const {
  if (session.failed_) {
    throw std::runtime_error("the session's last call failed: reset it before another");
  }
  if (count == 0 || count > static_cast<size_t>(most)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(most) + " tokens, got " +
                             std::to_string(count));
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
      const auto room =
          static_cast<size_t>(info_.max_seq_len + 2 * info_.draft_tokens - feed.session->position_);
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
  device_->copy_slot(*match.slot, 0, session.slot_);
  const size_t count = match.pages.size() * static_cast<size_t>(info_.page_size);
  session.pages_ = match.pages;
  session.tokens_.assign(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(count));
  session.position_ = static_cast<int64_t>(count);
  return {count, match.known};
}

void Model::remember(const Session& session, int64_t before, bool passing) {
  if (!cache_) return;
  const int64_t end =
      passing ? session.position_ / info_.page_size * info_.page_size : session.position_;
  if (end <= before) return;
  const auto tokens = session.tokens_.begin();
  // With drafts a call may go beyond the end of a page; it leaves a version behind each token.
  if (const auto slot = cache_->add({tokens, tokens + end}, session.pages_, passing)) {
    device_->copy_slot(session.slot_, passing ? end - before - 1 : 0, *slot);
  }
}

bool Model::is_ahead(const std::vector<Feed>& feeds, bool drafts) const {
  return drafts == ahead_drafts_ &&
         std::equal(feeds.begin(), feeds.end(), ahead_.begin(), ahead_.end(),
                    [](const Feed& feed, const Session* session) {
                      return feed.session == session && feed.token == session->drawn_ &&
                             feed.sampling == session->sampling_;
                    });
}

void Model::settle() {
  if (ahead_.empty()) return;
  const std::vector<Session*> sessions = std::exchange(ahead_, {});
  const std::vector<int64_t> values = device_->settle();
  if (values.empty()) return;
  if (const size_t expected = sessions.size() * drawn_width(ahead_drafts_);
      values.size() != expected) {
    for (Session* session : sessions) {
      if (session) session->failed_ = true;
    }
    throw std::runtime_error(both_files(program_.path(), weights_->path()) +
                             ": a call hands over " + std::to_string(values.size()) +
                             " values, expected " + std::to_string(expected));
  }
  std::vector<Drawn> drawn = read_drawn(values.data(), sessions.size(), ahead_drafts_);
  for (size_t i = 0; i < sessions.size(); ++i) {
    if (sessions[i]) sessions[i]->overtaken_ = std::move(drawn[i]);
  }
}

void Model::check_logits(const float* logits, size_t rows) const {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto size = static_cast<size_t>(info_.vocab_size);
  for (const float* row = logits; row != logits + rows * size; row += size) {
    int broken = 0;  // no search: this is what a compiler makes vectors of
    for (size_t i = 0; i < size; ++i) broken |= !(row[i] < kInfinity);
    if (broken == 0) continue;
    const float* first = std::find_if(row, row + size, [](float v) { return !(v < kInfinity); });
    throw std::runtime_error(both_files(program_.path(), weights_->path()) +
                             ": the logit of token " + std::to_string(first - row) + " is " +
                             std::to_string(*first));
  }
}

std::vector<Drawn> Model::read_drawn(const int64_t* values, size_t sequences, bool drafts) const {
  std::vector<Drawn> drawn;
  for (size_t i = 0; i < sequences; ++i) {
    if (!drafts) {
      drawn.push_back({0, values[i], {}});
      continue;
    }
    const int64_t* row = values + i * drawn_width(drafts);
    drawn.push_back({row[0], row[1], {row + 2, row + 2 + info_.draft_tokens}});
  }
  return drawn;
}

void Model::check_drawn(const Drawn& drawn, size_t fed) const {
  const std::string files = both_files(program_.path(), weights_->path());
  const auto check = [&](int64_t token, const char* what) {
    if (static_cast<uint64_t>(token) < static_cast<uint64_t>(info_.vocab_size)) return;
    throw std::runtime_error(files + ": the token " + std::to_string(token) + " is " + what +
                             ", expected 0 to " + std::to_string(info_.vocab_size - 1));
  };
  check(drawn.token, "drawn");
  for (const int64_t token : drawn.drafts) check(token, "drafted");
  if (static_cast<uint64_t>(drawn.accepted) < fed) return;
  throw std::runtime_error(files + ": " + std::to_string(drawn.accepted) + " of " +
                           std::to_string(fed - 1) + " drafts are accepted");
}

void Model::check_overtaken(Session& session, int64_t token, const Sampling& sampling) const {
  if (!session.overtaken_) return;
  if (token != session.drawn_ || !(sampling == session.sampling_)) {
    throw std::runtime_error(
        "the session has gone on from the token it drew, as it was asked to: reset it before "
        "another call");
  }
  session.failed_ = true;
  check_drawn(*session.overtaken_, fed_ahead(session).size());
  session.failed_ = false;
}

Tokens Model::fed_ahead(const Session& session) {
  Tokens fed{session.drawn_};
  // A method with drafts makes them; none are left behind a call of one without.
  if (!session.overtaken_->drafts.empty()) {
    fed.insert(fed.end(), session.drafts_.begin(), session.drafts_.end());
  }
  return fed;
}

Step Model::take_overtaken(Session& session) {
  const Tokens fed = fed_ahead(session);
  return advance(session, fed, *std::exchange(session.overtaken_, std::nullopt));
}

Step Model::advance(Session& session, const Tokens& fed, Drawn drawn) {
  // Of a prompt all tokens count; a decode call ends with the last draft that was accepted.
  const bool drafts = !drawn.drafts.empty();
  const auto accepted = static_cast<std::ptrdiff_t>(drawn.accepted);
  const auto end = drafts ? fed.begin() + 1 + accepted : fed.end();
  if (cache_) session.tokens_.insert(session.tokens_.end(), fed.begin(), end);
  session.position_ += end - fed.begin();
  session.version_ = drawn.accepted;
  session.drawn_ = drawn.token;
  session.drafts_ = std::move(drawn.drafts);
  Step step{{fed.begin() + 1, fed.begin() + 1 + accepted}, nullptr, drafts ? fed.size() - 1 : 0};
  step.tokens.push_back(drawn.token);
  return step;
}

bool Model::take_back(Session& session, size_t count) {
  if (count == 0) return true;
  settle();
  if (session.overtaken_) return false;
  session.position_ -= static_cast<int64_t>(count);
  session.version_ -= static_cast<int64_t>(count);
  if (cache_) session.tokens_.resize(session.tokens_.size() - count);
  session.drafts_.clear();  // they are behind another token
  return true;
}

std::vector<Drawn> Model::run_or_settle(const Call& call, const std::vector<Tokens>& fed,
                                        const float** logits) {
  try {
    const std::vector<const void*> outputs = device_->run(call);
    const auto* values = static_cast<const int64_t*>(outputs[0]);
    std::vector<Drawn> drawn = read_drawn(values, fed.size(), call.outputs[0] == kStep);
    for (size_t i = 0; i < fed.size(); ++i) check_drawn(drawn[i], fed[i].size());
    if (outputs.size() > 1) {
      *logits = static_cast<const float*>(outputs[1]);
      check_logits(*logits, call.method == kScore ? fed[0].size() : fed.size());
    }
    return drawn;
  } catch (...) {
    try {
      device_->settle();  // the call that failed may have been followed by another
    } catch (const std::exception&) {
      // What matters is why the first one failed.
    }
    throw;
  }
}

std::vector<Step> Model::call(const std::vector<Feed>& feeds, const std::vector<Tokens>& tokens,
                              const CallOptions& options) {
  const bool drafts = options.drafts;
  std::vector<TextRow> rows;
  bool run_ahead = options.run_ahead;
  for (size_t i = 0; i < feeds.size(); ++i) {
    const Session& session = *feeds[i].session;
    run_ahead = run_ahead && may_run_ahead(feeds[i], tokens[i], drafts);
    rows.push_back({tokens[i].data(), tokens[i].size(), session.position_, session.version_,
                    session.slot_, session.pages_, feeds[i].sampling});
  }
  size_t width = tokens[0].size();
  if (drafts) width = static_cast<size_t>(reach(true));
  if (options.full_logits) width = static_cast<size_t>(info_.score_tokens);
  inputs_->set(rows, width);
  const std::string& method = method_of(options, feeds.size(), width);
  for (const Feed& feed : feeds) feed.session->failed_ = true;
  ahead_.clear();
  const float* logits = nullptr;
  std::vector<Drawn> drawn =
      run_or_settle({method, inputs_->inputs(), outputs_of(options), run_ahead}, tokens, &logits);
  ahead_drafts_ = drafts;
  std::vector<Step> steps;
  for (size_t i = 0; i < feeds.size(); ++i) {
    Session& session = *feeds[i].session;
    session.failed_ = false;
    session.sampling_ = feeds[i].sampling;
    const int64_t before = session.position_;
    steps.push_back(advance(session, tokens[i], std::move(drawn[i])));
    if (logits) steps[i].logits = logits + static_cast<std::ptrdiff_t>(i) * info_.vocab_size;
    if (options.remember && feeds[i].remember) remember(session, before, drafts || width == 1);
    if (run_ahead) ahead_.push_back(&session);
  }
  return steps;
}

Step Model::run(Session& session, const int64_t* tokens, size_t count, const Sampling& sampling,
                const CallOptions& options) {
  const bool full_logits = options.full_logits;
  check_call(session, tokens, count, full_logits ? info_.score_tokens : info_.max_prefill_tokens);
  if (count > 1 || full_logits) {
    settle();
    check_overtaken(session, tokens[0], session.sampling_);
    if (session.overtaken_) {
      if (full_logits) throw std::runtime_error("the session has gone on without logits");
      session.overtaken_->accepted = 0;  // drafts that were fed, too, are not what follows here
      take_overtaken(session);
      ++tokens;
      --count;
    }
  }
  const Feed feed{&session, tokens[0], sampling};
  if (count == 1 && !full_logits) return decode({feed}, options).front();
  take_pages({feed}, count, false);
  CallOptions without_next = options;
  // A next call would be one of another method.
  without_next.run_ahead = without_next.drafts = false;
  return call({feed}, {Tokens(tokens, tokens + count)}, without_next).front();
}

Tokens Model::tokens_of(const Feed& feed, bool drafts) const {
  const Session& session = *feed.session;
  Tokens tokens{feed.token};
  if (!drafts || feed.token != session.drawn_) return tokens;
  const int64_t most = std::min(feed.most, info_.max_seq_len - session.position_);
  const auto count = std::clamp<int64_t>(most - 1, 0, static_cast<int64_t>(session.drafts_.size()));
  tokens.insert(tokens.end(), session.drafts_.begin(), session.drafts_.begin() + count);
  return tokens;
}

bool Model::may_run_ahead(const Feed& feed, const Tokens& tokens, bool drafts) const {
  const Session& session = *feed.session;
  // The next call is of as many tokens, none of which may be one too many.
  const int64_t most = std::min(feed.most, info_.max_seq_len - session.position_);
  if (static_cast<int64_t>(tokens.size()) < reach(drafts) || most < 2 * reach(drafts)) return false;
  // It would take its pages from this one, and write over what is to be remembered. Where it
  // begins is not known with drafts.
  const int64_t next = session.position_ + reach(drafts);
  const int64_t size = info_.page_size;
  if (cache_ && next / size != session.position_ / size) return false;
  // A method without drafts leaves version 0, and does not hand over that it is the next one's.
  return has_page(session, next + decode_tokens(drafts) - 1) && (drafts || session.version_ == 0);
}

std::vector<Step> Model::decode(const std::vector<Feed>& feeds, const CallOptions& options) {
  if (feeds.empty() || feeds.size() > static_cast<size_t>(info_.max_sequences)) {
    throw std::runtime_error("a call takes 1 to " + std::to_string(info_.max_sequences) +
                             " sequences, got " + std::to_string(feeds.size()));
  }
  for (const Feed& feed : feeds) check_call(*feed.session, &feed.token, 1, 1);
  if (!is_ahead(feeds, options.drafts)) settle();
  std::vector<Feed> rest;
  for (const Feed& feed : feeds) {
    check_overtaken(*feed.session, feed.token, feed.sampling);
    if (!feed.session->overtaken_) rest.push_back(feed);
  }
  std::vector<Step> made;
  if (!rest.empty()) {
    if (ahead_.empty()) take_pages(rest, decode_tokens(options.drafts), options.run_ahead);
    CallOptions now = options;
    now.run_ahead = options.run_ahead && rest.size() == feeds.size();
    std::vector<Tokens> tokens;
    for (const Feed& feed : rest) tokens.push_back(tokens_of(feed, options.drafts));
    made = call(rest, tokens, now);
  }
  std::vector<Step> steps;
  auto next = made.begin();
  for (const Feed& feed : feeds) {
    steps.push_back(feed.session->overtaken_ ? take_overtaken(*feed.session) : std::move(*next++));
  }
  return steps;
}

}  // namespace et_moe
