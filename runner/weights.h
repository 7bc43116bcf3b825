// The weights of a `.ptd` file, memory-mapped and checked.
#pragma once

#include <string>
#include <vector>

#include "backends/bindings.h"
#include "runner/files.h"
#include "runner/fingerprint.h"
#include "runner/flat_tensor.h"

namespace et_moe {

/// Maps a `.ptd`, checks its seal, that it has each tensor asked for with its dtype and shape, that
/// it was exported for the program, and the hash of each tensor's bytes (see
/// backends/sealed_file.py for the format).
class Weights {
 public:
  /// Throws std::runtime_error that names the file and the tensor at fault, and the program, too,
  /// where both disagree.
  Weights(const std::string& path, const std::vector<TensorSpec>& specs,
          const Fingerprint& program);

  const std::string& path() const { return path_; }

  /// The bytes of `specs[i]`; valid as long as this object lives.
  const void* data(size_t i) const { return data_[i]; }

  /// The file as ExecuTorch hands it to a delegate.
  const executorch::runtime::NamedDataMap& map() const { return tensors_; }

 private:
  /// What the file holds; throws std::runtime_error with its name unless its seal covers all of
  /// its header and nothing is behind its data.
  static FlatTensorMap read(const MappedFile& file, const std::string& path);
  void check_fingerprint(const Fingerprint& program) const;
  /// Of the entry of this name, or of all.
  void verify_checksums(const std::string& only = "") const;

  std::string path_;
  MappedFile file_;
  FlatTensorMap tensors_;
  std::vector<const void*> data_;
};

}  // namespace et_moe
