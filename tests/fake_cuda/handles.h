// What the opaque pointers of CUDA's interface stand for.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

namespace et_moe::fake_cuda {

inline uintptr_t last_handle = 0;

/// Live objects of one kind. A handle is a number that is never used again, also not for another
/// kind of object, so a stale or mistaken handle is noticed.
template <typename T>
class Handles {
 public:
  template <typename Handle>
  void add(std::shared_ptr<T> object, Handle* handle) {
    last_handle += 16;
    *handle = reinterpret_cast<Handle>(last_handle);
    live_.emplace(*handle, std::move(object));
  }
  /// Null for a handle that is not live.
  std::shared_ptr<T> find(const void* handle) const {
    const auto found = live_.find(handle);
    return found == live_.end() ? nullptr : found->second;
  }
  bool remove(const void* handle) { return live_.erase(handle) > 0; }
  const std::map<const void*, std::shared_ptr<T>>& all() const { return live_; }

 private:
  std::map<const void*, std::shared_ptr<T>> live_;
};

}  // namespace et_moe::fake_cuda
