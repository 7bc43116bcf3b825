#include "backends/bindings.h"

#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

#include <algorithm>
#include <set>
#include <stdexcept>

#include "backends/json.h"

namespace et_moe {
namespace {

using executorch::aten::ScalarType;

ScalarType parse_dtype(const std::string& name) {
  static const std::map<std::string, ScalarType> types = {
      {"uint8", ScalarType::Byte},       {"int8", ScalarType::Char},
      {"int32", ScalarType::Int},        {"int64", ScalarType::Long},
      {"float16", ScalarType::Half},     {"float32", ScalarType::Float},
      {"bfloat16", ScalarType::BFloat16}};
  const auto found = types.find(name);
  if (found == types.end()) throw std::runtime_error("unknown dtype " + name);
  return found->second;
}

/// Sizes as a tensor has them. Throws std::runtime_error for one that is none.
std::vector<int32_t> parse_shape(const nlohmann::json& sizes, const std::string& name) {
  std::vector<int32_t> shape;
  for (const int64_t size : sizes.get<std::vector<int64_t>>()) {
    if (size < 0 || size > INT32_MAX) {
      throw std::runtime_error("the tensor " + name + " has a dimension of " +
                               std::to_string(size));
    }
    shape.push_back(static_cast<int32_t>(size));
  }
  return shape;
}

Pool parse_pool(const std::string& name) {
  if (name == "pages") return Pool::kPages;
  if (name == "slots") return Pool::kSlots;
  throw std::runtime_error("unknown pool " + name);
}

TensorSpec parse_tensor(const nlohmann::json& entry) {
  const auto name = entry.at("name").get<std::string>();
  const std::vector<int32_t> shape = parse_shape(entry.at("shape"), name);
  const auto least = entry.find("min_shape");
  TensorSpec tensor{name, parse_dtype(entry.at("dtype").get<std::string>()), shape,
                    least == entry.end() ? shape : parse_shape(*least, name)};
  size_t bytes = executorch::runtime::elementSize(tensor.dtype);
  bool valid = tensor.min_shape.size() == shape.size();
  for (size_t i = 0; valid && i < shape.size(); ++i) {
    valid = tensor.min_shape[i] <= shape[i] &&
            !__builtin_mul_overflow(bytes, static_cast<size_t>(shape[i]), &bytes);
  }
  // Sums of such sizes, rounded up, must not overflow either.
  constexpr size_t kMostBytes = size_t{1} << 48;
  if (!valid || bytes > kMostBytes) {
    throw std::runtime_error("the tensor " + name + " has an impossible shape");
  }
  return tensor;
}

/// Throws std::runtime_error if two tensors have the same name: they are found by it.
template <typename Spec>
void check_names(const std::vector<Spec>& tensors) {
  std::set<std::string_view> names;
  for (const Spec& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      throw std::runtime_error("the tensor " + tensor.name + " is named twice");
    }
  }
}

/// A list of tensors, not too long.
const nlohmann::json& checked_list(const nlohmann::json& list) {
  constexpr size_t kMost = 1 << 15;
  if (!list.is_array() || list.size() > kMost) {
    throw std::runtime_error("expected a list of at most " + std::to_string(kMost) + " tensors");
  }
  return list;
}

/// An index among `count` outputs.
size_t parse_index(const nlohmann::json& entry) {
  const auto& index = entry.at("index");
  if (!index.is_number_unsigned() || index.get<uint64_t>() > INT32_MAX) {
    throw std::runtime_error("index is no index of an output");
  }
  return index.get<size_t>();
}

}  // namespace

size_t TensorSpec::nbytes() const {
  size_t count = executorch::runtime::elementSize(dtype);
  for (int32_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

bool TensorSpec::accepts(ScalarType type, const int32_t* sizes, size_t rank) const {
  bool fits = type == dtype && rank == shape.size();
  for (size_t i = 0; fits && i < rank; ++i) {
    fits = min_shape[i] <= sizes[i] && sizes[i] <= shape[i];
  }
  return fits;
}

std::string TensorSpec::describe() const {
  std::string text = std::string(executorch::runtime::toString(dtype)) + " [";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    if (min_shape[i] != shape[i]) text += std::to_string(min_shape[i]) + "..";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

TensorSpec StateSpec::in(const PoolSizes& sizes) const {
  TensorSpec tensor = *this;
  tensor.shape[0] = tensor.min_shape[0] = sizes.of(pool);
  return tensor;
}

size_t StateSpec::nbytes_each() const { return in({1, 1}).nbytes(); }

VersionBytes StateSpec::version_bytes(int32_t versions) const {
  if (versions == 1) return {nbytes_each(), 0};
  if (shape.size() < 2 || shape[1] < versions) {
    throw std::runtime_error("the state " + name + " is " + describe() + ", too small for " +
                             std::to_string(versions) + " versions");
  }
  const size_t row = nbytes_each() / static_cast<size_t>(shape[1]);
  return {row * static_cast<size_t>(shape[1] - versions + 1), row};
}

std::vector<TensorSpec> parse_tensors(const nlohmann::json& list) {
  std::vector<TensorSpec> tensors;
  for (const auto& entry : checked_list(list)) tensors.push_back(parse_tensor(entry));
  check_names(tensors);
  return tensors;
}

std::vector<StateSpec> parse_state(const nlohmann::json& list) {
  std::vector<StateSpec> tensors;
  for (const auto& entry : checked_list(list)) {
    const TensorSpec tensor = parse_tensor(entry);
    if (tensor.shape.empty() || tensor.min_shape[0] > 1 ||
        !std::equal(tensor.shape.begin() + 1, tensor.shape.end(), tensor.min_shape.begin() + 1)) {
      throw std::runtime_error("the state " + tensor.name + " is " + tensor.describe() +
                               ", expected only its first dimension to vary, from 1 on");
    }
    tensors.push_back({tensor, parse_pool(entry.at("pool").get<std::string>())});
  }
  check_names(tensors);
  return tensors;
}

MethodSpec MethodSpec::parse(const nlohmann::json& method) {
  MethodSpec spec;
  spec.inputs = parse_tensors(method.at("inputs"));
  for (const auto& entry : method.at("outputs")) {
    spec.outputs.push_back({parse_tensor(entry), parse_index(entry)});
  }
  check_names(spec.outputs);
  if (const auto& names = method.at("hand_over"); !names.is_null()) {
    spec.hand_over = {names.at("token").get<std::string>(), names.at("tokens").get<std::string>(),
                      names.at("positions").get<std::string>(), std::nullopt};
    if (names.contains("versions")) spec.hand_over->versions = names["versions"];
  }
  return spec;
}

Bindings Bindings::parse(const std::string& text) {
  const auto json = parse_json(text);
  Bindings bindings;
  for (const auto& [name, method] : json.at("methods").items()) {
    bindings.methods[name] = MethodSpec::parse(method);
  }
  bindings.state = parse_state(json.at("state"));
  bindings.weights = parse_tensors(json.at("weights"));
  return bindings;
}

}  // namespace et_moe
