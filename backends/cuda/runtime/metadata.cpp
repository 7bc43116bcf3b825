#include "backends/cuda/runtime/metadata.h"

#include <algorithm>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <utility>

#include "backends/cuda/runtime/alignment.h"
#include "backends/cuda/runtime/errors.h"
#include "backends/json.h"
#include "backends/messages.h"

namespace et_moe::cuda {
namespace {

constexpr int kFormat = 5;

/// The largest value of the one size that varies from call to call, in inputs and perhaps outputs;
/// 1 if none does. Throws std::runtime_error if there are several, or an inner dimension varies.
int64_t find_longest(const MethodSpec& spec) {
  std::optional<std::pair<int32_t, int32_t>> bounds;
  const auto check = [&bounds](const TensorSpec& tensor) {
    const auto free = free_dimension(tensor);
    if (!free) return;
    const std::pair found{tensor.min_shape[*free], tensor.shape[*free]};
    if (bounds.value_or(found) != found) {
      throw std::runtime_error("more than one dimension varies from call to call");
    }
    bounds = found;
    for (size_t d = 0; d < *free; ++d) {
      if (tensor.min_shape[d] != 1 || tensor.shape[d] != 1) {
        throw std::runtime_error("the tensor " + tensor.name + " varies in an inner dimension");
      }
    }
  };
  for (const TensorSpec& input : spec.inputs) check(input);
  const bool varies = bounds.has_value();
  for (const OutputSpec& output : spec.outputs) check(output);
  if (bounds && !varies) throw std::runtime_error("outputs vary from call to call, no input does");
  return bounds ? bounds->second : 1;
}

/// Sequences of a call, from the input that has one element for each.
struct Sequences {
  size_t most;
  bool varies;  // their number, and nothing else
};

/// Index of an int64 tensor of `width` elements for each sequence.
template <typename Spec>
size_t find_integers(const std::vector<Spec>& tensors, const std::string& name,
                     const Sequences& sequences, size_t width = 1) {
  const size_t i = find_tensor(tensors, name);
  if (i == tensors.size() || tensors[i].dtype != executorch::aten::ScalarType::Long ||
      tensors[i].nbytes() != sequences.most * width * sizeof(int64_t) ||
      free_dimension(tensors[i]) != (sequences.varies ? std::optional<size_t>(0) : std::nullopt)) {
    throw std::runtime_error("hand_over: no int64 tensor " + name + " with " +
                             (width == 1 ? "one element" : std::to_string(width) + " elements") +
                             " a sequence");
  }
  return i;
}

std::optional<HandOverIndices> find_hand_over(const MethodSpec& spec, int64_t longest) {
  if (!spec.hand_over) return std::nullopt;
  HandOverIndices found;
  size_t tokens = 1;
  const size_t at = find_tensor(spec.inputs, spec.hand_over->positions);
  const size_t bytes = at < spec.inputs.size() ? spec.inputs[at].nbytes() : 0;
  // A method whose size varies is made for any number of sequences.
  const Sequences sequences{std::max<size_t>(1, bytes / sizeof(int64_t)), longest > 1};
  found.positions = find_integers(spec.inputs, spec.hand_over->positions, sequences);
  if (const auto& versions = spec.hand_over->versions) {
    found.versions = find_integers(spec.inputs, *versions, sequences);
    const size_t i = find_tensor(spec.outputs, spec.hand_over->token);
    const size_t each = sequences.most * sizeof(int64_t);
    if (i < spec.outputs.size()) found.width = spec.outputs[i].nbytes() / each;
    if (found.width < 2) throw std::runtime_error("hand_over: no tokens of a call with drafts");
    tokens = found.width - 1;
  }
  found.token = find_integers(spec.outputs, spec.hand_over->token, sequences, found.width);
  found.tokens = find_integers(spec.inputs, spec.hand_over->tokens, sequences, tokens);
  return found;
}

/// How many pages and slots a state has; each is one that all its tensors may have.
PoolSizes parse_pool(const nlohmann::json& sizes, const std::vector<StateSpec>& state) {
  const PoolSizes pool{sizes.at("pages").get<int32_t>(), sizes.at("slots").get<int32_t>()};
  for (const StateSpec& tensor : state) {
    if (pool.of(tensor.pool) < 1 || pool.of(tensor.pool) > tensor.shape[0]) {
      throw std::runtime_error("own_pool is too small or too large for the state " + tensor.name);
    }
  }
  return pool;
}

/// The code is given the outputs in their order: each has one index below their number.
void check_outputs(const std::vector<OutputSpec>& outputs) {
  std::vector<bool> found(outputs.size());
  for (const OutputSpec& output : outputs) {
    if (output.index >= outputs.size() || found[output.index]) {
      throw std::runtime_error("the output " + output.name + " has the index " +
                               std::to_string(output.index) + " of " +
                               std::to_string(outputs.size()));
    }
    found[output.index] = true;
  }
}

/// The code of one architecture; throws std::runtime_error unless it is for all lengths.
std::vector<CodeInfo> parse_ranges(const nlohmann::json& ranges, int64_t longest) {
  std::vector<CodeInfo> code;
  for (const auto& range : ranges) {
    CodeInfo info{range.at("longest").get<int64_t>(),
                  range.at("data").get<std::string>(),
                  range.at("sha256").get<std::string>(),
                  {}};
    for (const auto& kernel : range.at("kernels")) {
      info.kernels.push_back(kernel.at("sha256").get<std::string>());
    }
    if (!code.empty() && code.back().longest >= info.longest) {
      throw std::runtime_error("the code is not in the order of its lengths");
    }
    code.push_back(std::move(info));
  }
  if (code.empty() || code.back().longest != longest) {
    throw std::runtime_error("the code is not for lengths up to " + std::to_string(longest));
  }
  return code;
}

MethodInfo parse_info(const nlohmann::json& json) {
  MethodInfo info;
  info.method = json.at("method").get<std::string>();
  info.prepack = json.at("prepack").get<std::string>();
  info.spec = MethodSpec::parse(json);
  check_outputs(info.spec.outputs);
  info.state = parse_state(json.at("state"));
  info.own_pool = parse_pool(json.at("own_pool"), info.state);
  info.weights = parse_tensors(json.at("weights"));
  info.longest = find_longest(info.spec);
  for (const auto& [arch, ranges] : json.at("code").items()) {
    info.code[arch] = parse_ranges(ranges, info.longest);
  }
  info.hand_over = find_hand_over(info.spec, info.longest);
  return info;
}

}  // namespace

std::optional<size_t> free_dimension(const TensorSpec& tensor) {
  std::optional<size_t> found;
  for (size_t d = 0; d < tensor.shape.size(); ++d) {
    if (tensor.min_shape[d] != tensor.shape[d]) found = d;
  }
  return found;
}

TensorSpec with_length(TensorSpec tensor, int64_t length) {
  if (const auto free = free_dimension(tensor)) {
    tensor.shape[*free] = static_cast<int32_t>(length);
  }
  return tensor;
}

size_t nbytes_at(const TensorSpec& tensor, int64_t length) {
  const auto free = free_dimension(tensor);
  if (!free) return tensor.nbytes();
  return tensor.nbytes() / static_cast<size_t>(tensor.shape[*free]) * static_cast<size_t>(length);
}

std::vector<size_t> aligned_offsets(const std::vector<TensorSpec>& tensors) {
  std::vector<size_t> offsets{0};
  for (const TensorSpec& tensor : tensors) {
    offsets.push_back(offsets.back() + aligned(tensor.nbytes()));
  }
  return offsets;
}

int64_t MethodInfo::sequences_at(int64_t length) const {
  if (!hand_over) return 0;
  return static_cast<int64_t>(nbytes_at(spec.inputs[hand_over->positions], length) /
                              sizeof(int64_t));
}

MethodInfo MethodInfo::parse(std::string_view text) {
  const std::string where = "the delegate's description of a method: ";
  try {
    const auto json = parse_json(text);
    if (json.at("format").get<int>() != kFormat) {
      throw DelegateError(Error::DelegateInvalidCompatibility,
                          where + "format " + to_text(json.at("format")) + ", this runner reads " +
                              std::to_string(kFormat) + "; export it again with `et-moe export`");
    }
    return parse_info(json);
  } catch (const DelegateError&) {
    throw;
  } catch (const std::exception& e) {
    throw DelegateError(Error::InvalidProgram, where + reason(e));
  }
}

namespace {

/// The number of an architecture's name: 90 of "sm_90"; 0 if there is none.
int number_of(const std::string& architecture) {
  return architecture.rfind("sm_", 0) == 0 ? std::atoi(architecture.c_str() + 3) : 0;
}

/// What to do about a GPU without code, in words that `et-moe export` accepts.
std::string advice(const std::string& architecture) {
  // Those of backends/cuda/gpu.py.
  static const std::set<std::string> exported = {"sm_80",  "sm_86",  "sm_89",  "sm_90",
                                                 "sm_100", "sm_103", "sm_120", "sm_121"};
  return exported.count(architecture)
             ? ": export it again with `--backend cuda --cuda-arch " + architecture + "`"
             : "; this kind of GPU is not supported, export it with `--backend cpu`";
}

}  // namespace

const std::vector<CodeInfo>& MethodInfo::code_for(const std::string& architecture) const {
  const auto exact = code.find(architecture);
  if (exact != code.end()) return exact->second;
  // A cubin runs on later minor versions of its major version: sm_80's on sm_86, sm_89. From sm_90
  // on kernels are compiled for their architecture alone (sm_90a), and a cubin runs there only.
  const int wanted = number_of(architecture);
  int best = 0;
  std::string have;
  for (const auto& [arch, info] : code) {
    have += (have.empty() ? "" : ", ") + arch;
    const int found = number_of(arch);
    if (wanted < 90 && found / 10 == wanted / 10 && found < wanted) best = std::max(best, found);
  }
  if (best) return code.at("sm_" + std::to_string(best));
  throw DelegateError(
      Error::NotSupported,
      "this GPU is " + architecture + ", the program has code for " + have + advice(architecture));
}

}  // namespace et_moe::cuda
