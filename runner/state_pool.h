// Which pages and slots of the state on a device are in use; backends/ops/sequences.py says what
// they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backends/bindings.h"

namespace et_moe {

/// Numbers of slots that are free; those given back last are taken first.
class FreeList {
 public:
  /// All from `first` on, so many.
  FreeList(int32_t first, int32_t size);

  size_t size() const { return free_.size(); }
  /// There must be one.
  int32_t take();
  void give(int32_t number) { free_.push_back(number); }

 private:
  std::vector<int32_t> free_;
};

/// Pages, which several may hold: sequences, and one cache of what sequences leave behind.
class Pages {
 public:
  explicit Pages(int32_t size) : free_(0, size), held_(static_cast<size_t>(size)) {}

  /// How many nobody holds.
  size_t size() const { return free_.size(); }
  /// How many the cache alone holds.
  size_t idle() const { return idle_; }
  /// One that nobody holds; there must be one.
  int32_t take();
  /// Holds a page that is held already.
  void hold(int32_t page);
  void give(int32_t page);
  /// Whether the cache is one of those who hold a page.
  void set_cached(int32_t page, bool cached);

 private:
  struct Held {
    uint32_t by = 0;  // how many
    bool cached = false;
    bool is_idle() const { return cached && by == 1; }
  };
  template <typename Change>
  void change(int32_t page, const Change& make);

  FreeList free_;
  std::vector<Held> held_;
  size_t idle_ = 0;
};

/// Slots are of sequences, or of snapshots of sequences.
struct StatePool {
  StatePool(int32_t all_pages, int32_t sequences, int32_t all_snapshots, int32_t versions = 1)
      : sizes{all_pages, sequences + all_snapshots, versions},
        pages(all_pages),
        slots(0, sequences),
        snapshots(sequences, all_snapshots) {}

  const PoolSizes sizes;
  Pages pages;
  FreeList slots, snapshots;
};

}  // namespace et_moe
