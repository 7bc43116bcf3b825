// Scratch memory of compiled code: allocated while it first runs, reused ever after.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <vector>

#include "backends/cuda/runtime/cuda.h"

namespace et_moe::cuda {

/// Hands out device memory by first fit and takes it back; asks CUDA for more only when nothing
/// fits. Work on one stream runs in order, so memory may be handed out again at once. After one
/// eager run of a program the same sequence of allocations fits without asking, so a captured
/// graph never allocates; one that would is refused.
class Arena {
 public:
  /// Memory that goes back to its arena with the last reference to it; an arena must outlive it.
  using Block = std::shared_ptr<std::byte>;

  /// At least `size` bytes, aligned to 256. Throws CudaError, or std::runtime_error if memory is
  /// frozen and nothing fits.
  Block allocate(size_t size);

  /// While frozen, the arena does not grow.
  void set_frozen(bool frozen) { frozen_ = frozen; }

  /// Bytes taken from CUDA.
  size_t capacity() const;

 private:
  void release(std::byte* begin);

  std::vector<DeviceBuffer> chunks_;
  std::map<std::byte*, size_t> free_, used_;  // blocks by address
  bool frozen_ = false;
};

}  // namespace et_moe::cuda
