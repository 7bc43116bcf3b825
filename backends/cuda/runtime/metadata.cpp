#include "backends/cuda/runtime/metadata.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "backends/cuda/runtime/alignment.h"
#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {
namespace {

constexpr int kFormat = 4;

std::optional<FreeDimension> find_free_dimension(const std::vector<TensorSpec>& inputs) {
  std::optional<FreeDimension> found;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorSpec& input = inputs[i];
    for (size_t d = 0; d < input.shape.size(); ++d) {
      if (input.min_shape[d] == input.shape[d]) continue;
      if (found) throw std::runtime_error("more than one dimension varies from call to call");
      found = {i, d};
    }
    for (size_t d = 0; found && found->input == i && d < found->dimension; ++d) {
      if (input.shape[d] != 1) {
        throw std::runtime_error("the input " + input.name + " varies in an inner dimension");
      }
    }
  }
  return found;
}

/// Index of a tensor of `count` int64 elements.
template <typename Spec>
size_t find_integers(const std::vector<Spec>& tensors, const std::string& name, size_t count) {
  const size_t i = find_tensor(tensors, name);
  if (i == tensors.size() || tensors[i].dtype != executorch::aten::ScalarType::Long ||
      tensors[i].nbytes() != count * sizeof(int64_t)) {
    throw std::runtime_error("hand_over: no int64 tensor " + name);
  }
  return i;
}

std::optional<HandOverIndices> find_hand_over(const MethodSpec& spec) {
  if (!spec.hand_over) return std::nullopt;
  return HandOverIndices{find_integers(spec.outputs, spec.hand_over->token, 1),
                         find_integers(spec.inputs, spec.hand_over->tokens, 1),
                         find_integers(spec.inputs, spec.hand_over->position, 1)};
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
  info.state = parse_tensors(json.at("state"));
  info.weights = parse_tensors(json.at("weights"));
  info.free_dimension = find_free_dimension(info.spec.inputs);
  for (const auto& [arch, ranges] : json.at("code").items()) {
    info.code[arch] = parse_ranges(ranges, info.longest());
  }
  info.hand_over = find_hand_over(info.spec);
  return info;
}

}  // namespace

std::vector<size_t> aligned_offsets(const std::vector<TensorSpec>& tensors) {
  std::vector<size_t> offsets{0};
  for (const TensorSpec& tensor : tensors) {
    offsets.push_back(offsets.back() + aligned(tensor.nbytes()));
  }
  return offsets;
}

MethodInfo MethodInfo::parse(std::string_view text) {
  const std::string where = "the delegate's description of a method: ";
  try {
    const auto json = nlohmann::json::parse(text);
    if (json.at("format").get<int>() != kFormat) {
      throw DelegateError(Error::DelegateInvalidCompatibility,
                          where + "format " + json.at("format").dump() + ", this runner reads " +
                              std::to_string(kFormat) + "; export it again with `et-moe export`");
    }
    return parse_info(json);
  } catch (const DelegateError&) {
    throw;
  } catch (const std::exception& e) {
    throw DelegateError(Error::InvalidProgram, where + e.what());
  }
}

int64_t MethodInfo::longest() const {
  if (!free_dimension) return 1;
  return spec.inputs[free_dimension->input].shape[free_dimension->dimension];
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
