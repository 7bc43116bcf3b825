// What the exporter says of a method: the JSON of backends/cuda/backend.py (`describe`).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backends/bindings.h"

namespace et_moe::cuda {

/// Where in one piece of memory each tensor begins, and behind the last one its size.
std::vector<size_t> aligned_offsets(const std::vector<TensorSpec>& tensors);

/// The code for one range of the length that varies from call to call.
struct CodeInfo {
  int64_t longest;                   // the largest length of the range; 1 if none varies
  std::string data;                  // name of the blob in the `.pte`
  std::string sha256;                // of the blob, hexadecimal
  std::vector<std::string> kernels;  // SHA-256 of each one that it launches
};

/// The dimension of a tensor that varies from call to call, if one does. In a method's description
/// those before it are 1, so that a shorter tensor is the beginning of a longer one.
std::optional<size_t> free_dimension(const TensorSpec& tensor);

/// A tensor with this size in the dimension that varies, if one does.
TensorSpec with_length(TensorSpec tensor, int64_t length);
/// Bytes of that tensor.
size_t nbytes_at(const TensorSpec& tensor, int64_t length);

/// Indices of the tensors that `HandOver` names, among outputs and inputs.
struct HandOverIndices {
  size_t token, tokens, positions;
  std::optional<size_t> versions;
  size_t width = 1;  // elements of `token` for each sequence
};

struct MethodInfo {
  std::string method, prepack;
  MethodSpec spec;
  std::vector<StateSpec> state;
  std::vector<TensorSpec> weights;
  PoolSizes own_pool;  // of the state for callers that choose no sizes
  std::map<std::string, std::vector<CodeInfo>> code;  // by architecture; in rising order of lengths
  int64_t longest = 1;  // the largest size of the one dimension that varies from call to call
  std::optional<HandOverIndices> hand_over;

  /// How many sequences a call of a length has, by a hand-over's positions; 0 if there is none.
  int64_t sequences_at(int64_t length) const;

  /// Throws DelegateError: DelegateInvalidCompatibility for another version of the format,
  /// InvalidProgram, with the key or tensor at fault, for anything else.
  static MethodInfo parse(std::string_view json);

  /// The code for a GPU: of its own architecture, or, before sm_90, of an older one with the same
  /// major version.
  /// Throws DelegateError (NotSupported) that lists what there is and how to export for this one.
  const std::vector<CodeInfo>& code_for(const std::string& architecture) const;
};

}  // namespace et_moe::cuda
