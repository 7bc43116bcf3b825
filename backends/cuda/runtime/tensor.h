// The tensors that compiled code works on: what its handles point to.
//
// AOTInductor's code reaches tensors through C functions (torch/csrc/inductor/aoti_torch/c/shim.h);
// aoti_shims.cpp implements those that code without library calls needs, over this type.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "backends/cuda/runtime/arena.h"
#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {

struct Tensor {
  std::byte* data;  // of the storage; offset is counted in elements from here
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  int32_t dtype = 0;   // c10::ScalarType
  Arena::Block owner;  // null for memory that is owned elsewhere

  int64_t numel() const;
  /// Bytes of an element.
  int64_t itemsize() const;
  /// Bytes from the first to past the last element.
  int64_t nbytes() const;
};

/// A contiguous tensor over memory owned elsewhere.
std::unique_ptr<Tensor> view(std::byte* data, std::vector<int64_t> sizes, int32_t dtype);

/// Bytes of an element of a c10::ScalarType; 0 for one that is not supported.
int64_t itemsize(int32_t dtype);

/// While this lives, compiled code on this thread allocates from `arena`.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena);
  ~ArenaScope();
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena* previous_;
};

/// What went wrong first, on this thread, in a function that compiled code called since the last
/// time this was asked. The code itself only learns that something did.
std::optional<DelegateError> take_error();

}  // namespace et_moe::cuda
