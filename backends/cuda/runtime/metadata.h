// What the exporter says of a method: the JSON of backends/cuda/backend.py (`describe`).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe::cuda {

struct TensorInfo {
  std::string name;
  int32_t dtype;               // c10::ScalarType
  std::vector<int64_t> shape;  // upper bounds where a dimension varies from call to call

  size_t nbytes() const;
};

/// Where in one piece of memory each tensor begins, and behind the last one its size.
std::vector<size_t> aligned_offsets(const std::vector<TensorInfo>& tensors);

struct CodeInfo {
  std::string data;  // name of the blob in the `.pte`
  size_t bytes;
  std::string sha256;  // of the blob, hexadecimal
};

struct MethodInfo {
  std::string method, prepack;
  std::vector<TensorInfo> inputs, state, weights, outputs;
  std::map<std::string, CodeInfo> code;  // by architecture

  /// Throws std::runtime_error that names the key at fault.
  static MethodInfo parse(std::string_view json);

  /// The code for a GPU: of its own architecture, or of an older one with the same major version.
  /// Throws std::runtime_error that lists what there is and how to export for this one.
  const CodeInfo& code_for(const std::string& architecture) const;
};

}  // namespace et_moe::cuda
