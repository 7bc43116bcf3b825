#include "runner/async_engine.h"

#include <algorithm>
#include <utility>

namespace et_moe {

AsyncEngine::AsyncEngine(const std::string& pte_path, const std::string& ptd_path,
                         const AsyncEngineOptions& options)
    : options_(options) {
  if (options_.max_sequences == 0) throw InvalidRequest("max_sequences 0: expected at least 1");
  std::promise<ModelInfo> loaded;
  auto info = loaded.get_future();
  thread_ = std::thread(&AsyncEngine::run, this, pte_path, ptd_path, std::move(loaded));
  try {
    info_ = info.get();
  } catch (...) {
    thread_.join();
    throw;
  }
}

AsyncEngine::~AsyncEngine() { close(); }

uint64_t AsyncEngine::submit(Request request) {
  if (request.prompt_ids.empty()) throw InvalidRequest("the prompt is empty");
  if (request.prompt_ids.size() > static_cast<size_t>(info_.max_seq_len)) {
    throw InvalidRequest("the prompt has " + std::to_string(request.prompt_ids.size()) +
                         " tokens, the context of the program holds " +
                         std::to_string(info_.max_seq_len));
  }
  check_ids(request.prompt_ids, info_.vocab_size, "the prompt: ");
  check(request.params, info_.vocab_size);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (refusal_) throw EngineBroken(*refusal_);
  // Those that the thread has not admitted yet, though there is a place, do not wait for one.
  if (live_.size() >= options_.max_sequences + options_.max_waiting) {
    throw QueueFull("the queue is full: " + std::to_string(waiting_.size()) +
                    " requests wait already");
  }
  const uint64_t id = next_id_++;
  live_.emplace(id, Live{request.params.guided, false, {}});
  waiting_.push_back({id, std::move(request)});
  changed_.notify_one();
  return id;
}

void AsyncEngine::cancel(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto live = live_.find(id);
  if (live == live_.end()) return;
  const auto waiting =
      std::find_if(waiting_.begin(), waiting_.end(), [id](const Waiting& w) { return w.id == id; });
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
  return {waiting_.size(), live_.size() - waiting_.size(), options_.max_sequences, broken_};
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
  free_.clear();
  model_.reset();
}

void AsyncEngine::load(const std::string& pte_path, const std::string& ptd_path) {
  model_ = std::make_unique<Model>(pte_path, ptd_path, options_.device);
  while (free_.size() < options_.max_sequences) {
    try {
      free_.push_back(model_->new_session());
    } catch (const std::runtime_error& e) {
      throw std::runtime_error("there is memory for " + std::to_string(free_.size()) + " of " +
                               std::to_string(options_.max_sequences) + " sequences: " + e.what());
    }
  }
}

void AsyncEngine::serve() {
  while (collect()) {
    take_turns();
    drop_ended();
  }
}

bool AsyncEngine::has_work() const {
  if (!waiting_.empty() && !free_.empty()) return true;
  return std::any_of(running_.begin(), running_.end(), [this](const auto& sequence) {
    const Live& live = live_.at(sequence->id());
    return !sequence->needs_mask() || live.cancelled || !live.masks.empty();
  });
}

bool AsyncEngine::collect() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return closing_ || has_work(); });
  if (closing_) return false;
  std::vector<std::unique_ptr<Sequence>> cancelled;
  for (auto& sequence : running_) {
    Live& live = live_.at(sequence->id());
    if (live.cancelled) {
      cancelled.push_back(std::move(sequence));
    } else if (sequence->takes_mask() && !live.masks.empty()) {
      sequence->give_mask(std::move(live.masks.front()));
      live.masks.pop_front();
    }
  }
  for (; !waiting_.empty() && !free_.empty(); waiting_.pop_front(), free_.pop_back()) {
    Waiting& next = waiting_.front();
    running_.push_back(std::make_unique<Sequence>(next.id, std::move(next.request),
                                                  std::move(free_.back()), *model_));
  }
  lock.unlock();
  for (auto& sequence : cancelled) {
    Event event{sequence->id(), {}, {}, {}, RequestEnd::kCancelled, {}};
    finish(sequence, sequence->release(), std::move(event));
  }
  drop_ended();
  return true;
}

void AsyncEngine::drop_ended() {
  running_.erase(std::remove(running_.begin(), running_.end(), nullptr), running_.end());
}

void AsyncEngine::take_turns() {
  const bool alone = running_.size() == 1;
  for (auto& sequence : running_) {
    if (!sequence->in_prompt() && !sequence->needs_mask()) step(sequence, alone);
  }
  const auto next = std::find_if(running_.begin(), running_.end(),
                                 [](const auto& s) { return s && s->in_prompt(); });
  if (next != running_.end()) step(*next, alone);
}

void AsyncEngine::step(std::unique_ptr<Sequence>& sequence, bool alone) {
  Event event{sequence->id(), {}, {}, {}, {}, {}};
  try {
    event = sequence->step(alone);
  } catch (const std::exception& e) {
    event.end = RequestEnd::kError;
    event.error = e.what();
  }
  if (event.end) {
    auto session = sequence->release();
    if (event.end == RequestEnd::kError) session = recover(std::move(session), event.error);
    finish(sequence, std::move(session), std::move(event));
  } else if (!event.token_ids.empty() || event.prompt_logprobs) {
    events_.push(std::move(event));
  }
}

void AsyncEngine::finish(std::unique_ptr<Sequence>& sequence, std::unique_ptr<Session> session,
                         Event event) {
  free_.push_back(std::move(session));
  sequence.reset();
  const std::lock_guard<std::mutex> lock(mutex_);
  live_.erase(event.request_id);
  events_.push(std::move(event));
}

std::unique_ptr<Session> AsyncEngine::recover(std::unique_ptr<Session> session,
                                              const std::string& why) {
  const auto try_it = [this](Session& tried) {
    const int64_t token = 0;
    model_->reset(tried);
    model_->run(tried, &token, 1, Sampling());
  };
  try {
    try_it(*session);
    return session;
  } catch (const std::exception&) {
    session.reset();
  }
  try {
    session = model_->new_session();
    try_it(*session);
    return session;
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
