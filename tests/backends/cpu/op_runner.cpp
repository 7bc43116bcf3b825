// Runs a .pte's `forward` on tensors from a file, for tests that compare kernels with references.
//
// op_runner MANIFEST: a JSON object
//   program   path of the .pte
//   data      path of the inputs' bytes, all calls' tensors one after the other
//   output    where to write the outputs' bytes, in the same way
//   threads   number of threads of the thread pool; 0 leaves the pool as it is
//   calls     for each call a list of tensors [dtype number, size, size, ...]
// Prints JSON: for each call {"error": number, "tensors": as in `calls`, "seconds": time}.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include "backends/json.h"

// The wheel ships the pool's library without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::EValue;
using nlohmann::json;

namespace {

json describe(const Tensor& tensor) {
  json description = {static_cast<int>(tensor.scalar_type())};
  for (auto size : tensor.sizes()) description.push_back(size);
  return description;
}

// Input tensors with memory of exactly their size each, so that a sanitizer sees every overrun.
struct Inputs {
  std::vector<std::vector<char>> memory;
  std::vector<executorch::extension::TensorPtr> tensors;
  std::vector<EValue> values;

  Inputs(const json& call, std::istream& data) {
    for (const json& description : call) {
      const auto type = static_cast<ScalarType>(description[0].get<int>());
      size_t bytes = executorch::runtime::elementSize(type);
      std::vector<executorch::aten::SizesType> sizes;
      for (size_t i = 1; i < description.size(); ++i) {
        sizes.push_back(description[i].get<int>());
        bytes *= sizes.back();
      }
      memory.emplace_back(bytes);
      data.read(memory.back().data(), static_cast<std::streamsize>(bytes));
      tensors.push_back(executorch::extension::from_blob(memory.back().data(), sizes, type));
      values.emplace_back(*tensors.back());
    }
  }
};

json run(executorch::extension::Module& module, const Inputs& inputs, std::ostream& output) {
  const auto start = std::chrono::steady_clock::now();
  const auto results = module.execute("forward", inputs.values);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  json report = {{"error", static_cast<int>(results.error())},
                 {"tensors", json::array()},
                 {"seconds", elapsed.count()}};
  if (!results.ok()) return report;
  for (const EValue& value : *results) {
    const Tensor tensor = value.toTensor();
    report["tensors"].push_back(describe(tensor));
    output.write(static_cast<const char*>(tensor.const_data_ptr()),
                 static_cast<std::streamsize>(tensor.nbytes()));
  }
  return report;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: op_runner MANIFEST\n");
    return 2;
  }
  std::ifstream file(argv[1]);
  const json manifest = et_moe::parse_json(std::string(std::istreambuf_iterator<char>(file), {}));
  if (const uint32_t threads = manifest["threads"]; threads > 0) {
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
  }
  executorch::extension::Module module(manifest["program"].get<std::string>());
  if (module.load_forward() != executorch::runtime::Error::Ok) return 1;
  std::ifstream data(manifest["data"].get<std::string>(), std::ios::binary);
  std::ofstream output(manifest["output"].get<std::string>(), std::ios::binary);
  json reports = json::array();
  for (const json& call : manifest["calls"]) {
    reports.push_back(run(module, Inputs(call, data), output));
  }
  if (!data || !output.flush()) return 1;
  std::cout << reports << std::endl;
}
