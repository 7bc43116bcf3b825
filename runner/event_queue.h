// Events on their way from the engine's thread to whoever waits for a file descriptor.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

#include "runner/request.h"

namespace et_moe {

/// May be used by any threads at once. What becomes of a request while an event of it waits is
/// added to that event, but a call with drafts has one of its own: an answer may end within its
/// tokens, and has as many of its drafts.
class EventQueue {
 public:
  /// Throws std::runtime_error if there is no descriptor left.
  EventQueue();
  ~EventQueue();
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  /// Readable while events wait: an eventfd that does not block.
  int fileno() const { return fd_; }
  void push(Event event);
  /// The events since the last call, in order of the first news of each request.
  std::vector<Event> take();

 private:
  const int fd_;
  std::mutex mutex_;
  std::vector<Event> events_;
  std::map<uint64_t, size_t> index_;  // request -> its last event
};

}  // namespace et_moe
