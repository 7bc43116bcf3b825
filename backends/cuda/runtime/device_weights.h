// Weights on the GPU: uploaded once, shared by the methods and sessions of a program.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/metadata.h"

namespace et_moe::cuda {

class DeviceWeights {
 public:
  /// Checks that `data` has every tensor with its dtype, shape and size, that they fit into the
  /// GPU's free memory, and copies them there through pinned memory on several threads.
  /// Throws DelegateError: InvalidExternalData that names the tensor, or MemoryAllocationFailed
  /// that says how much memory is needed and free.
  DeviceWeights(const executorch::runtime::NamedDataMap& data,
                const std::vector<TensorSpec>& tensors);

  /// Address of a tensor; all are aligned to 256 bytes.
  std::byte* at(const std::string& name) const { return memory_.data() + offsets_.at(name); }

 private:
  std::map<std::string, size_t> offsets_;
  DeviceBuffer memory_;
};

}  // namespace et_moe::cuda
