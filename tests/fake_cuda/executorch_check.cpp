// Drives programs by ExecuTorch's API alone, as a program that knows nothing of the runner does;
// tests/fake_cuda/test_executorch_api.py runs it. Over the fake driver, or for a CPU program, which
// takes state and weights as arguments, without it.
//
//   executorch_check run MODEL.pte MODEL.ptd METHOD INPUTS...
//     Calls a method once for each INPUTS, a JSON object of name -> list of integers, along the
//     dimension that varies, or else the last one. Prints a JSON object of the outputs for each;
//     or, if a call or the load fails, {"error": NAME, "at": "load" | "execute"} and no more.
//   executorch_check programs MODEL.pte METHOD INPUTS MODEL.ptd...
//     Loads all methods of the program once for each MODEL.ptd, all at the same time, and calls one
//     in turns, three times each, unloading it in between: the other methods keep the state. Prints
//     a JSON list of the outputs for each. Then everything must be released.

#include <dlfcn.h>
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstring>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "backends/bindings.h"
#include "backends/json.h"

namespace {

using et_moe::Bindings;
using et_moe::TensorSpec;
using executorch::aten::ScalarType;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::from_blob;
using executorch::extension::MmapDataLoader;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using Json = nlohmann::json;

struct Failure {
  Error error;
  const char* at;
};

/// What a program for the CPU takes besides inputs: state for one sequence, and weights.
std::vector<TensorSpec> bound(const Bindings& bindings) {
  std::vector<TensorSpec> tensors;
  for (const et_moe::StateSpec& state : bindings.state) tensors.push_back(state.in({1, 1}));
  tensors.insert(tensors.end(), bindings.weights.begin(), bindings.weights.end());
  return tensors;
}

/// A program with its weights, and for the CPU with state.
class Program {
 public:
  Program(const std::string& pte, const std::string& ptd)
      : module_(pte, ptd, Module::LoadMode::Mmap), cpu_(text("get_backend") == "\"cpu\"") {
    bindings_ = Bindings::parse(text("get_bindings"));
    for (const TensorSpec& tensor : bound(bindings_)) buffers_.emplace_back(tensor.nbytes());
    if (cpu_) read_weights(ptd);
  }

  void load_all() {
    for (const auto& entry : bindings_.methods) load(entry.first);
  }

  void load(const std::string& method) {
    const Error error = module_.load_method(method);
    if (error != Error::Ok) throw Failure{error, "load"};
  }

  Json execute(const std::string& method, const Json& inputs) {
    const auto& spec = bindings_.methods.at(method);
    std::vector<std::vector<int64_t>> values;
    std::vector<std::vector<int32_t>> narrow;
    narrow.reserve(spec.inputs.size());
    std::vector<TensorPtr> tensors;
    for (const TensorSpec& input : spec.inputs) {
      values.push_back(inputs.at(input.name).get<std::vector<int64_t>>());
      std::vector<int32_t> shape(input.shape.size(), 1);
      size_t along = shape.size() - 1;
      for (size_t d = 0; d < shape.size(); ++d) {
        if (input.min_shape[d] != input.shape[d]) along = d;
      }
      shape[along] = static_cast<int32_t>(values.back().size());
      void* data = values.back().data();
      if (input.dtype == ScalarType::Int) {
        narrow.emplace_back(values.back().begin(), values.back().end());
        data = narrow.back().data();
      }
      tensors.push_back(from_blob(data, shape, input.dtype));
    }
    size_t buffer = 0;
    if (cpu_) {
      for (const TensorSpec& t : bound(bindings_)) {
        tensors.push_back(from_blob(buffers_[buffer++].data(), t.shape, t.dtype));
      }
    }
    const std::vector<EValue> arguments(tensors.begin(), tensors.end());
    const auto results = module_.execute(method, arguments);
    if (!results.ok()) throw Failure{results.error(), "execute"};
    Json outputs;
    for (const et_moe::OutputSpec& output : spec.outputs) {
      const auto& tensor = results->at(output.index).toTensor();
      if (tensor.scalar_type() == ScalarType::Long) {
        const auto* data = tensor.const_data_ptr<int64_t>();
        outputs[output.name] = std::vector<int64_t>(data, data + tensor.numel());
      } else {
        const auto* data = tensor.const_data_ptr<float>();
        outputs[output.name] = std::vector<float>(data, data + tensor.numel());
      }
    }
    return outputs;
  }

  void unload(const std::string& method) { module_.unload_method(method); }

 private:
  std::string text(const char* constant) {
    const auto value = module_.get(constant);
    if (!value.ok()) throw std::runtime_error(std::string("no constant ") + constant);
    return std::string(value->toString());
  }

  void read_weights(const std::string& path) {
    auto loader = MmapDataLoader::from(path.c_str());
    auto map = FlatTensorDataMap::load(&*loader);
    for (size_t i = 0; i < bindings_.weights.size(); ++i) {
      const auto data = map->get_data(bindings_.weights[i].name);
      std::memcpy(buffers_[bindings_.state.size() + i].data(), data->data(), data->size());
    }
  }

  Module module_;
  const bool cpu_;
  Bindings bindings_;
  std::vector<std::vector<uint8_t>> buffers_;  // state, zeroed, then weights
};

void run(char** argv, int argc) {
  Program program(argv[2], argv[3]);
  program.load(argv[4]);
  for (int i = 5; i < argc; ++i) {
    std::cout << et_moe::to_text(program.execute(argv[4], et_moe::parse_json(argv[i])))
              << std::endl;
  }
}

void programs(char** argv, int argc) {
  constexpr int kCalls = 3;
  const std::string method = argv[3];
  const Json inputs = et_moe::parse_json(argv[4]);
  std::vector<std::unique_ptr<Program>> loaded;
  std::vector<Json> outputs(static_cast<size_t>(argc - 5), Json::array());
  for (int i = 5; i < argc; ++i) {
    loaded.push_back(std::make_unique<Program>(argv[2], argv[i]));
    loaded.back()->load_all();
  }
  for (int call = 0; call < kCalls; ++call) {
    for (size_t i = 0; i < loaded.size(); ++i) {
      outputs[i].push_back(loaded[i]->execute(method, inputs));
      if (call == 1) loaded[i]->unload(method);
    }
  }
  for (const Json& list : outputs) std::cout << et_moe::to_text(list) << "\n";
  loaded.clear();
  auto* live = reinterpret_cast<size_t (*)()>(dlsym(RTLD_DEFAULT, "fake_cuda_live"));
  if (live && live() != 0) throw std::runtime_error(std::to_string(live()) + " things are left");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc >= 6 ? argv[1] : "";
  try {
    if (command == "run") {
      run(argv, argc);
    } else if (command == "programs") {
      programs(argv, argc);
    } else {
      throw std::runtime_error("usage: see the top of executorch_check.cpp");
    }
  } catch (const Failure& f) {
    std::cout << Json{{"error", executorch::runtime::to_string(f.error)}, {"at", f.at}} << "\n";
  } catch (const std::exception& e) {
    std::cerr << "executorch_check: " << e.what() << "\n";
    return 1;
  }
  return 0;
}
