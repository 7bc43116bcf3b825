#include "runner/state_pool.h"

namespace et_moe {

FreeList::FreeList(int32_t first, int32_t size) {
  for (int32_t i = size; i > 0; --i) free_.push_back(first + i - 1);
}

int32_t FreeList::take() {
  const int32_t number = free_.back();
  free_.pop_back();
  return number;
}

template <typename Change>
void Pages::change(int32_t page, const Change& make) {
  Held& held = held_[static_cast<size_t>(page)];
  idle_ -= held.is_idle();
  make(held);
  idle_ += held.is_idle();
}

int32_t Pages::take() {
  const int32_t page = free_.take();
  hold(page);
  return page;
}

void Pages::hold(int32_t page) {
  change(page, [](Held& held) { ++held.by; });
}

void Pages::give(int32_t page) {
  change(page, [](Held& held) { --held.by; });
  if (held_[static_cast<size_t>(page)].by == 0) free_.give(page);
}

void Pages::set_cached(int32_t page, bool cached) {
  change(page, [cached](Held& held) { held.cached = cached; });
}

}  // namespace et_moe
