#include "runner/async_engine.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace et_moe {
AsyncEngine::AsyncEngine(const std::string& pte_path, const std::string& ptd_path,
                         const AsyncEngineOptions& options)
    : options_(options) {
  if (options_.model.max_sequences == 0) {
    throw InvalidRequest("max_sequences 0: expected at least 1");
  }
  std::promise<ModelInfo> loaded;
  auto info = loaded.get_future();
  try {
    thread_ = std::thread(&AsyncEngine::run, this, pte_path, ptd_path, std::move(loaded));
  } catch (const std::system_error& e) {
    throw std::runtime_error(pte_path +
                             ": the engine's thread cannot be started: " + e.code().message());
  }
  try {
    info_ = info.get();
  } catch (...) {
    thread_.join();
    throw;
  }
}

AsyncEngine::~AsyncEngine() { close(); }

void AsyncEngine::check(const Request& request) const {
  const bool is_answered = request.params.max_tokens.value_or(1) != 0;
  check_length(request.prompt_ids.size(), 0, is_answered, info_.max_seq_len);
  check_ids(request.prompt_ids, info_.vocab_size, "the prompt: ");
  et_moe::check(request.params, info_.vocab_size);
}

uint64_t AsyncEngine::submit(Request request) {
  std::vector<Request> requests;
  requests.push_back(std::move(request));
  return submit(std::move(requests)).front();
}

std::vector<uint64_t> AsyncEngine::submit(std::vector<Request> requests) {
  for (const Request& request : requests) check(request);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (refusal_) throw EngineBroken(*refusal_);
  // Those that the thread has not admitted yet, though there is a place, do not wait for one.
  if (live_.size() + requests.size() > options_.model.max_sequences + options_.max_waiting) {
    throw QueueFull("the queue is full: " + std::to_string(waiting_.size()) +
                    " requests wait already");
  }
  std::vector<uint64_t> ids;
  for (Request& request : requests) {
    const uint64_t id = ids.emplace_back(next_id_++);
    live_.emplace(id, Live{request.params.guided, false, {}});
    waiting_.push_back(std::make_unique<Sequence>(id, std::move(request), *model_));
  }
  changed_.notify_one();
  return ids;
}

void AsyncEngine::cancel(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto live = live_.find(id);
  if (live == live_.end()) return;
  const auto waiting =
      std::find_if(waiting_.begin(), waiting_.end(), [id](const auto& w) { return w->id() == id; });
  if (waiting == waiting_.end()) {
    live->second.cancelled = true;
    changed_.notify_one();
    return;
  }
  waiting_.erase(waiting);
  live_.erase(live);
  events_.push({id, {}, {}, {}, RequestEnd::kCancelled, {}});
}

void AsyncEngine::allow(uint64_t id, TokenMask mask) {
  const auto expected = static_cast<size_t>(info_.vocab_size + 7) / 8;
  if (mask.size() != expected) {
    throw InvalidRequest("the mask has " + std::to_string(mask.size()) + " bytes, expected " +
                         std::to_string(expected));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto live = live_.find(id);
  if (live == live_.end()) return;
  if (!live->second.guided) {
    throw InvalidRequest("request " + std::to_string(id) + " is not guided: it takes no mask");
  }
  live->second.masks.push_back(std::move(mask));
  changed_.notify_one();
}

EngineStatus AsyncEngine::status() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {waiting_.size(),
          live_.size() - waiting_.size(),
          options_.model.max_sequences,
          pages_,
          free_pages_,
          preemptions_,
          broken_};
}

void AsyncEngine::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    if (!refusal_) refusal_ = "the engine is closed";
    changed_.notify_one();
  }
  const std::lock_guard<std::mutex> lock(closing_mutex_);
  if (thread_.joinable()) thread_.join();
}

void AsyncEngine::run(const std::string& pte_path, const std::string& ptd_path,
                      std::promise<ModelInfo> loaded) {
  bool is_loaded = false;
  try {
    load(pte_path, ptd_path);
    is_loaded = true;
    loaded.set_value(model_->info());
    serve();
    end_all(RequestEnd::kCancelled, "");
  } catch (const std::exception& e) {
    if (is_loaded) {
      end_all(RequestEnd::kError, e.what());
    } else {
      loaded.set_exception(std::current_exception());
    }
  }
  running_.clear();
  if (is_loaded) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_pages_ = model_->free_pages();
  }
  model_.reset();
}

void AsyncEngine::load(const std::string& pte_path, const std::string& ptd_path) {
  model_ = std::make_unique<Model>(pte_path, ptd_path, options_.model);
  pages_ = free_pages_ = model_->pages();
}

void AsyncEngine::serve() {
  while (collect()) {
    draw_waiting();
    decode();
    prefill();
    drop_ended();
  }
}

bool AsyncEngine::can_admit() const {
  if (waiting_.empty() || running_.size() == options_.model.max_sequences) return false;
  if (running_.empty()) return true;
  size_t wanted = waiting_.front()->pages_to_go_on();
  for (const auto& sequence : running_) {
    const size_t all = sequence->pages_to_go_on();
    wanted += all - std::min(all, sequence->pages());
  }
  return wanted <= model_->free_pages();
}

bool AsyncEngine::has_work() const {
  if (can_admit()) return true;
  return std::any_of(running_.begin(), running_.end(), [this](const auto& sequence) {
    const Live& live = live_.at(sequence->id());
    return !sequence->needs_mask() || live.cancelled || !live.masks.empty();
  });
}

bool AsyncEngine::collect() {
  std::unique_lock<std::mutex> lock(mutex_);
  free_pages_ = model_->free_pages();
  changed_.wait(lock, [this] { return closing_ || has_work(); });
  if (closing_) return false;
  std::vector<std::unique_ptr<Sequence>> cancelled;
  for (auto& sequence : running_) {
    Live& live = live_.at(sequence->id());
    if (live.cancelled) {
      events_.push({sequence->id(), {}, {}, {}, RequestEnd::kCancelled, {}});
      live_.erase(sequence->id());
      cancelled.push_back(std::move(sequence));
    } else if (sequence->takes_mask() && !live.masks.empty()) {
      sequence->give_mask(std::move(live.masks.front()));
      live.masks.pop_front();
    }
  }
  cancelled.clear();  // gives back their state
  drop_ended();
  const auto failure = admit();
  lock.unlock();
  if (failure) probe(*failure);
  return true;
}

std::optional<std::string> AsyncEngine::admit() {
  while (can_admit()) {
    auto next = std::move(waiting_.front());
    waiting_.pop_front();
    try {
      next->begin(model_->new_session());
    } catch (const std::exception& e) {
      events_.push({next->id(), {}, {}, {}, RequestEnd::kError, e.what()});
      live_.erase(next->id());
      return e.what();  // and its place is free for a probe
    }
    running_.push_back(std::move(next));
  }
  return std::nullopt;
}

void AsyncEngine::drop_ended() {
  running_.erase(std::remove(running_.begin(), running_.end(), nullptr), running_.end());
}

std::vector<Sequence*> AsyncEngine::choose(bool (Sequence::*wanted)() const) const {
  std::vector<Sequence*> chosen;
  for (const auto& sequence : running_) {
    if (sequence && (sequence.get()->*wanted)()) chosen.push_back(sequence.get());
  }
  return chosen;
}

void AsyncEngine::draw_waiting() {
  for (Sequence* sequence : choose(&Sequence::can_draw)) {
    deliver(*sequence, [&] { return sequence->draw_waiting(); });
  }
}

void AsyncEngine::decode() {
  auto ready = make_room(choose(&Sequence::decodes));
  const auto most = static_cast<size_t>(info_.max_sequences);
  const auto running = static_cast<size_t>(
      std::count_if(running_.begin(), running_.end(), [](const auto& s) { return s != nullptr; }));
  const auto with_drafts = std::stable_partition(ready.begin(), ready.end(),
                                                 [](const Sequence* s) { return !s->drafts(); });
  const bool drafts = ready.end() - with_drafts <= info_.draft_sequences;
  const auto end = drafts ? with_drafts : ready.end();
  const bool is_all = ready.size() == running && ready.size() <= most &&
                      (end == ready.begin() || end == ready.end());
  for (auto first = ready.begin(); first < end;) {
    const auto last = first + std::min(static_cast<std::ptrdiff_t>(most), end - first);
    decode({first, last}, is_all, false);
    first = last;
  }
  if (end != ready.end()) decode({end, ready.end()}, is_all, true);
}

void AsyncEngine::decode(const std::vector<Sequence*>& batch, bool is_all, bool drafts) {
  std::vector<Feed> feeds;
  CallOptions options;
  options.run_ahead = is_all;
  options.drafts = drafts;
  for (const Sequence* sequence : batch) {
    feeds.push_back(sequence->feed());
    options.logits = options.logits || sequence->wants_logits();
    options.run_ahead = options.run_ahead && sequence->goes_on();
  }
  std::vector<Step> steps;
  try {
    steps = model_->decode(feeds, options);
  } catch (const std::exception& e) {
    return fail(batch, e.what());
  }
  for (size_t i = 0; i < batch.size(); ++i) {
    deliver(*batch[i], [&] { return batch[i]->take(steps[i]); });
  }
}

void AsyncEngine::prefill() {
  const auto prompts = choose(&Sequence::in_prompt);
  if (prompts.empty()) return;
  prompts.front()->reuse_prefix();
  if (!prompts.front()->in_prompt()) return;
  const bool alone = choose(&Sequence::decodes).empty();
  prompts.front()->bound_pieces(alone ? SIZE_MAX : options_.piece_beside_others);
  const auto first = make_room({prompts.front()});
  if (first.empty()) return;
  Event event{};
  try {
    event = first[0]->feed_prompt();
  } catch (const std::exception& e) {
    return fail(first, e.what());
  }
  deliver(*first[0], [&] { return std::move(event); });
}

std::vector<Sequence*> AsyncEngine::make_room(std::vector<Sequence*> batch) {
  const auto missing = [&batch] {
    size_t pages = 0;
    for (const Sequence* sequence : batch) pages += sequence->missing_pages();
    return pages;
  };
  while (missing() > model_->free_pages()) {
    const auto last = std::find_if(running_.rbegin(), running_.rend(),
                                   [](const auto& sequence) { return sequence != nullptr; });
    batch.erase(std::remove(batch.begin(), batch.end(), last->get()), batch.end());
    (*last)->put_back();
    const std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_front(std::move(*last));
    ++preemptions_;
  }
  return batch;
}

void AsyncEngine::deliver(Sequence& sequence, const std::function<Event()>& next) {
  Event event{sequence.id(), {}, {}, {}, {}, {}};
  try {
    event = next();
  } catch (const std::exception& e) {
    event.end = RequestEnd::kError;
    event.error = e.what();
  }
  if (event.end) {
    finish(sequence, std::move(event));
  } else if (!event.token_ids.empty() || event.prompt_logprobs) {
    events_.push(std::move(event));
  }
}

void AsyncEngine::finish(Sequence& sequence, Event event) {
  std::find_if(running_.begin(), running_.end(), [&sequence](const auto& s) {
    return s.get() == &sequence;
  })->reset();
  const std::lock_guard<std::mutex> lock(mutex_);
  live_.erase(event.request_id);
  events_.push(std::move(event));
}

void AsyncEngine::fail(const std::vector<Sequence*>& batch, const std::string& why) {
  std::vector<uint64_t> ids;
  for (auto& sequence : running_) {
    if (std::find(batch.begin(), batch.end(), sequence.get()) == batch.end()) continue;
    ids.push_back(sequence->id());
    sequence.reset();
  }
  probe(why);  // before anybody hears of it: a broken engine takes no more requests
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const uint64_t id : ids) {
    live_.erase(id);
    events_.push({id, {}, {}, {}, RequestEnd::kError, why});
  }
}

void AsyncEngine::probe(const std::string& why) {
  try {
    const int64_t token = 0;
    model_->run(*model_->new_session(), &token, 1, Sampling());
  } catch (const OutOfPages&) {
    return;  // says nothing of the device
  } catch (const std::exception& e) {
    throw EngineBroken("the device failed: " + why + "; and with a fresh state: " + e.what());
  }
}

void AsyncEngine::end_all(RequestEnd end, const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (end == RequestEnd::kError) refusal_ = broken_ = why;
  for (const auto& [id, live] : live_) events_.push({id, {}, {}, {}, end, why});
  waiting_.clear();
  live_.clear();
}

}  // namespace et_moe
