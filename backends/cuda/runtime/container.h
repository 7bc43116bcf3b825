// The code of one method, by AOTInductor's C interface.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "backends/cuda/runtime/kernels.h"
#include "backends/cuda/runtime/shared_object.h"
#include "backends/cuda/runtime/tensor.h"

namespace et_moe::cuda {

/// AOTInductor's C interface of one shared object (torch/csrc/inductor/aoti_runtime/interface.h).
class Container {
 public:
  /// Loads the code, which finds its kernels in `kernels`, owned elsewhere; `name` is for messages.
  /// Throws DelegateError.
  Container(const void* data, size_t size, const std::string& name, const Kernels& kernels);
  ~Container();
  Container(const Container&) = delete;
  Container& operator=(const Container&) = delete;

  /// Puts the work of one call on the stream; scratch memory comes from the active ArenaScope.
  /// Returns the outputs, `count` of them. Throws DelegateError.
  std::vector<std::unique_ptr<Tensor>> run(std::vector<std::unique_ptr<Tensor>> inputs,
                                           size_t count, cudaStream_t stream) const;

 private:
  /// Throws DelegateError with what the code says of its last failure.
  [[noreturn]] void fail(const std::string& what) const;

  using Delete = int32_t(void*);
  using Run = int32_t(void*, Tensor**, size_t, Tensor**, size_t, void*, void*);
  using LastError = int32_t(const char**);

  std::string name_;
  const Kernels& kernels_;
  SharedObject code_;
  Run* run_;
  Delete* delete_;
  LastError* last_error_;
  void* handle_ = nullptr;
};

}  // namespace et_moe::cuda
