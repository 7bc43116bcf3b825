#include "runner/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

namespace et_moe {
namespace {

template <typename Item>
void append(std::vector<Item>& to, std::vector<Item>&& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

EventQueue::EventQueue() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (fd_ < 0) throw std::runtime_error(std::string("no eventfd: ") + std::strerror(errno));
}

EventQueue::~EventQueue() { close(fd_); }

void EventQueue::push(Event event) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [found, is_new] = index_.try_emplace(event.request_id, events_.size());
  const auto fed_drafts = [](const Event& e) { return e.drafts.steps > 0; };
  if (is_new || fed_drafts(event) || fed_drafts(events_[found->second])) {
    found->second = events_.size();
    events_.push_back(std::move(event));
  } else {
    Event& waiting = events_[found->second];
    append(waiting.token_ids, std::move(event.token_ids));
    append(waiting.drawn_ms, std::move(event.drawn_ms));
    append(waiting.logprobs, std::move(event.logprobs));
    if (event.prompt_logprobs) waiting.prompt_logprobs = std::move(event.prompt_logprobs);
    waiting.end = event.end;
    waiting.error = std::move(event.error);
  }
  if (events_.size() == 1) eventfd_write(fd_, 1);
}

std::vector<Event> EventQueue::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  eventfd_t count;
  eventfd_read(fd_, &count);
  index_.clear();
  return std::exchange(events_, {});
}

}  // namespace et_moe
