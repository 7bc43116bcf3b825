#include "runner/state_pool.h"

namespace et_moe {

FreeList::FreeList(int32_t size) {
  for (int32_t i = size; i > 0; --i) free_.push_back(i - 1);
}

int32_t FreeList::take() {
  const int32_t number = free_.back();
  free_.pop_back();
  return number;
}

}  // namespace et_moe
