// Which pages and slots of the state on a device are in use; backends/ops/sequences.py says what
// they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backends/bindings.h"

namespace et_moe {

/// Numbers of pages, or of slots, that are free; those taken last are given first.
class FreeList {
 public:
  explicit FreeList(int32_t size);

  size_t size() const { return free_.size(); }
  /// There must be one.
  int32_t take();
  void give(int32_t number) { free_.push_back(number); }

 private:
  std::vector<int32_t> free_;
};

struct StatePool {
  explicit StatePool(const PoolSizes& all) : sizes(all), pages(all.pages), slots(all.slots) {}

  const PoolSizes sizes;
  FreeList pages, slots;
};

}  // namespace et_moe
