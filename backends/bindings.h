// What a program says of its methods, so that tensors are bound by name: the JSON that
// backends/bindings.py writes.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe {

/// A contiguous tensor that a method takes or returns.
struct TensorSpec {
  std::string name;
  executorch::aten::ScalarType dtype;
  std::vector<int32_t> shape;      // upper bounds where a dimension varies from call to call
  std::vector<int32_t> min_shape;  // lower bounds; equal to `shape` where nothing varies

  /// Bytes of a tensor of the largest shape.
  size_t nbytes() const;
  /// Whether a tensor of this dtype and shape is one of these.
  bool accepts(executorch::aten::ScalarType type, const int32_t* sizes, size_t rank) const;
  /// Such as "Long [1, 2..2048]", for messages.
  std::string describe() const;
};

/// An output, and its place among what the method of the program returns.
struct OutputSpec : TensorSpec {
  size_t index = 0;
};

/// What state is made of; backends/ops/sequences.py says what they are.
enum class Pool { kPages, kSlots };

/// How many pages and slots there are, and how many versions of its state a slot has: a call that
/// is fed drafts leaves one behind each token, of which the next call goes on from any.
struct PoolSizes {
  int32_t pages = 0, slots = 0, versions = 1;

  int32_t of(Pool pool) const { return pool == Pool::kPages ? pages : slots; }
};

/// Bytes of one version of what is in a slot, and from a version to the next.
struct VersionBytes {
  size_t size, step;
};

/// A tensor of state, whose first dimension counts what the pool has. `shape` and `min_shape` say
/// how much that may be.
struct StateSpec : TensorSpec {
  Pool pool = Pool::kSlots;

  /// The tensor in a pool of this size.
  TensorSpec in(const PoolSizes& sizes) const;
  /// Bytes of one page or slot.
  size_t nbytes_each() const;
  /// Version v of a slot with so many versions, where its rows are [D, ...], are its rows v to
  /// D - versions + v: those of a convolution overlap. Throws std::runtime_error if D is less than
  /// versions.
  VersionBytes version_bytes(int32_t versions) const;
};

/// Which output of a method is the next token of each sequence, `int64 [B, 1]`, and which inputs of
/// the next call follow from it: the tokens, `int64 [B, 1]`, and how many came before, `int64 [B]`.
/// Of a method that is fed drafts the output, `int64 [B, 1 + R]`, is how many of them were accepted
/// and the R tokens of the next call, and `versions` is the input that the number becomes.
struct HandOver {
  std::string token, tokens, positions;
  std::optional<std::string> versions;
};

/// What a method takes and returns per call.
struct MethodSpec {
  std::vector<TensorSpec> inputs;  // in the order in which the program's method takes them
  std::vector<OutputSpec> outputs;
  std::optional<HandOver> hand_over;

  /// Throws std::runtime_error, or an exception of nlohmann::json, that names what is wrong.
  static MethodSpec parse(const nlohmann::json& method);
};

/// What the constant method `get_bindings` says of a program.
struct Bindings {
  std::map<std::string, MethodSpec> methods;
  std::vector<StateSpec> state;     // that sequences share; methods update it in place
  std::vector<TensorSpec> weights;  // in the `.ptd`; shared by all methods

  /// Throws like `MethodSpec::parse`.
  static Bindings parse(const std::string& text);
};

/// Throws like `MethodSpec::parse`.
std::vector<TensorSpec> parse_tensors(const nlohmann::json& list);
/// Throws like `MethodSpec::parse`.
std::vector<StateSpec> parse_state(const nlohmann::json& list);

/// Index of the tensor of a name; the number of tensors if there is none.
template <typename Spec>
size_t find_tensor(const std::vector<Spec>& tensors, std::string_view name) {
  size_t i = 0;
  while (i < tensors.size() && tensors[i].name != name) ++i;
  return i;
}

}  // namespace et_moe
