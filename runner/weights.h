// The weights of a `.ptd` file, memory-mapped and checked.
#pragma once

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>

#include <optional>
#include <string>
#include <vector>

#include "backends/bindings.h"

namespace et_moe {

/// Maps a `.ptd`, checks its seal, that it has each tensor asked for with its dtype and shape, and
/// the hash of each tensor's bytes (see backends/sealed_file.py for the format).
class Weights {
 public:
  /// Throws std::runtime_error that names the file and the tensor at fault.
  Weights(const std::string& path, const std::vector<TensorSpec>& specs);

  /// The bytes of `specs[i]`; valid as long as this object lives.
  const void* data(size_t i) const { return buffers_[i].data(); }

  /// The file as ExecuTorch hands it to a delegate.
  const executorch::runtime::NamedDataMap& map() const { return *map_; }

 private:
  void verify_checksums(const std::string& path, const std::vector<TensorSpec>& specs) const;

  std::optional<executorch::extension::MmapDataLoader> loader_;
  std::optional<executorch::extension::FlatTensorDataMap> map_;
  std::vector<executorch::runtime::FreeableBuffer> buffers_;
};

}  // namespace et_moe
