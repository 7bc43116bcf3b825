// An AsyncEngine and its only client, for async_engine_check.
#pragma once

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "runner/async_engine.h"

namespace et_moe {

using Ids = std::vector<int64_t>;

inline void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("expected " + what);
}

/// An engine and all that it has said of each request.
class Client {
 public:
  Client(const std::string& pte, const std::string& ptd, const AsyncEngineOptions& options)
      : engine_(pte, ptd, options) {}

  AsyncEngine& engine() { return engine_; }

  /// All events of a request so far as one, once it has `tokens` of them or has ended.
  const Event& wait(uint64_t id, size_t tokens = SIZE_MAX) {
    while (true) {
      const Event& event = all_[id];
      if (event.end || event.token_ids.size() >= tokens) return event;
      pollfd ready{engine_.fileno(), POLLIN, 0};
      expect(poll(&ready, 1, 300000) == 1, "an event within five minutes");
      take();
    }
  }

  void take() {
    for (Event& event : engine_.take_events()) {
      Event& all = all_[event.request_id];
      expect(!all.end, "no event after the last one");
      all.token_ids.insert(all.token_ids.end(), event.token_ids.begin(), event.token_ids.end());
      for (auto& logprob : event.logprobs) all.logprobs.push_back(std::move(logprob));
      if (event.prompt_logprobs) all.prompt_logprobs = std::move(event.prompt_logprobs);
      all.end = event.end;
      all.cached_tokens = std::max(all.cached_tokens, event.cached_tokens);
      all.error = event.error;
    }
  }

  /// Forgets the events of a request that has ended.
  void forget(uint64_t id) { all_.erase(id); }

  TokenMask all_tokens() const {
    return TokenMask(static_cast<size_t>(engine_.info().vocab_size + 7) / 8, 0xff);
  }

  /// A request that waits before each token until `allow` is called.
  uint64_t submit_guided(Ids prompt, int64_t max_tokens) {
    Request request{std::move(prompt), {}};
    request.params.guided = request.params.ignore_eos = true;
    request.params.max_tokens = max_tokens;
    return engine_.submit(std::move(request));
  }

  void expect_idle() {
    const auto status = engine_.status();
    expect(status.waiting == 0 && status.running == 0, "no request left");
    // Pages are counted when the engine has nothing left to do.
    for (int i = 0; i < 1000 && engine_.status().free_pages < status.pages; ++i) usleep(1000);
    expect(engine_.status().free_pages == status.pages, "no page lost");
  }

 private:
  AsyncEngine engine_;
  std::map<uint64_t, Event> all_;
};

inline Request greedy(Ids prompt, int64_t max_tokens) {
  Request request{std::move(prompt), {}};
  request.params.max_tokens = max_tokens;
  request.params.ignore_eos = true;
  return request;
}

}  // namespace et_moe
