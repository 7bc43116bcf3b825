#include "backends/cuda/runtime/metadata.h"

#include <nlohmann/json.hpp>
#include <stdexcept>

#include "backends/cuda/runtime/alignment.h"
#include "backends/cuda/runtime/tensor.h"

namespace et_moe::cuda {
namespace {

constexpr int kFormat = 2;

int32_t parse_dtype(const std::string& name) {
  static const std::map<std::string, int32_t> dtypes = {
      {"uint8", 0},   {"int8", 1},    {"int32", 3}, {"int64", 4},
      {"float16", 5}, {"float32", 6}, {"bool", 11}, {"bfloat16", 15}};
  const auto found = dtypes.find(name);
  if (found == dtypes.end()) throw std::runtime_error("unknown dtype " + name);
  return found->second;
}

std::vector<TensorInfo> parse_tensors(const nlohmann::json& list) {
  std::vector<TensorInfo> tensors;
  for (const auto& entry : list) {
    tensors.push_back({entry.at("name").get<std::string>(),
                       parse_dtype(entry.at("dtype").get<std::string>()),
                       entry.at("shape").get<std::vector<int64_t>>()});
  }
  return tensors;
}

}  // namespace

size_t TensorInfo::nbytes() const {
  int64_t count = itemsize(dtype);
  for (int64_t size : shape) count *= size;
  return static_cast<size_t>(count);
}

std::vector<size_t> aligned_offsets(const std::vector<TensorInfo>& tensors) {
  std::vector<size_t> offsets{0};
  for (const TensorInfo& tensor : tensors) {
    offsets.push_back(offsets.back() + aligned(tensor.nbytes()));
  }
  return offsets;
}

MethodInfo MethodInfo::parse(std::string_view text) {
  try {
    const auto json = nlohmann::json::parse(text);
    if (json.at("format").get<int>() != kFormat) {
      throw std::runtime_error("format " + json.at("format").dump() + ", this runner reads " +
                               std::to_string(kFormat));
    }
    MethodInfo info{json.at("method").get<std::string>(),
                    json.at("prepack").get<std::string>(),
                    parse_tensors(json.at("inputs")),
                    parse_tensors(json.at("state")),
                    parse_tensors(json.at("weights")),
                    parse_tensors(json.at("outputs")),
                    {}};
    for (const auto& [arch, code] : json.at("code").items()) {
      info.code[arch] = {code.at("data").get<std::string>(), code.at("bytes").get<size_t>(),
                         code.at("sha256").get<std::string>()};
    }
    return info;
  } catch (const std::exception& e) {
    throw std::runtime_error(std::string("the delegate's description of a method: ") + e.what());
  }
}

const CodeInfo& MethodInfo::code_for(const std::string& architecture) const {
  const auto exact = code.find(architecture);
  if (exact != code.end()) return exact->second;
  // A cubin runs on later minor versions of its major version: sm_80's on sm_86, sm_89.
  const CodeInfo* best = nullptr;
  std::string have;
  for (const auto& [arch, info] : code) {  // in rising order within a major version
    have += (have.empty() ? "" : ", ") + arch;
    const bool same_major =
        arch.substr(0, arch.size() - 1) == architecture.substr(0, architecture.size() - 1);
    if (same_major && arch < architecture) best = &info;
  }
  if (best) return *best;
  throw std::runtime_error("this GPU is " + architecture + ", the program has code for " + have +
                           ": export it again with `--backend cuda --cuda-arch " + architecture +
                           "`");
}

}  // namespace et_moe::cuda
