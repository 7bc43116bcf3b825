#include "backends/cuda/runtime/context.h"

#include <map>
#include <mutex>
#include <string_view>
#include <utility>

#include "backends/cuda/runtime/errors.h"
#include "backends/cuda/runtime/scope.h"

namespace et_moe::cuda {
namespace {

using executorch::runtime::NamedDataMap;

constexpr char kLayout[] = "et_moe.layout";  // LAYOUT of backends/sealed_file.py

/// Opens the driver before any member of a context makes a CUDA call.
struct DriverOpened {
  DriverOpened() { open_driver(); }
};

/// Addresses of the first and the last name in a data map. The files that make up the map own that
/// memory for as long as they are loaded, so this tells loaded programs apart. The address of the
/// map does not: ExecuTorch merges those of the program and of the weights anew for each method,
/// one after the other.
using ProgramKey = std::pair<const char*, const char*>;

ProgramKey key_of(const NamedDataMap& data) {
  const auto count = data.get_num_keys();
  if (!count.ok() || *count == 0) {
    throw DelegateError(Error::InvalidProgram, "the program is loaded without its data");
  }
  const auto first = data.get_key(0), last = data.get_key(*count - 1);
  return {first.ok() ? *first : nullptr, last.ok() ? *last : nullptr};
}

/// The methods of a program share state and weights, which the first that was loaded brought:
/// checks that another takes no tensor that is not among these as it is there.
template <typename Spec>
void check_shared(const MethodInfo& info, const char* kind, const std::vector<Spec>& taken,
                  const std::vector<Spec>& known) {
  for (const Spec& tensor : taken) {
    const size_t i = find_tensor(known, tensor.name);
    if (i < known.size() && known[i].dtype == tensor.dtype && known[i].shape == tensor.shape) {
      continue;
    }
    throw DelegateError(Error::InvalidProgram,
                        "method " + info.method + " takes the " + kind + " " + tensor.name +
                            " as " + tensor.describe() + ", the methods before it " +
                            (i < known.size() ? "as " + known[i].describe() : "do not"));
  }
}

}  // namespace

Context::Context(bool use_graphs) : use_graphs_(use_graphs), stream_((DriverOpened(), Stream())) {}

Context::~Context() = default;

std::shared_ptr<Context> Context::of(const NamedDataMap& data) {
  if (auto active = LoadScope::context()) return active;
  static std::mutex mutex;
  static std::map<ProgramKey, std::weak_ptr<Context>> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = contexts.begin(); it != contexts.end();) {
    it = it->second.expired() ? contexts.erase(it) : std::next(it);
  }
  auto& known = contexts[key_of(data)];
  auto context = known.lock();
  if (!context) known = context = std::make_shared<Context>();
  return context;
}

std::unique_ptr<Session> Context::new_session(const PoolSizes& sizes) const {
  return std::make_unique<Session>(stream_, state_, sizes);
}

void Context::adopt(const NamedDataMap& data, const MethodInfo& info) {
  const auto layout = data.get_data(kLayout);
  const std::string_view have(layout.ok() ? static_cast<const char*>(layout->data()) : "",
                              layout.ok() ? layout->size() : 0);
  if (have != info.prepack) {
    throw DelegateError(Error::InvalidExternalData,
                        "the weights are prepacked as \"" + std::string(have) +
                            "\", the program takes \"" + info.prepack +
                            "\": export program and weights with one version of et-moe, for CUDA");
  }
  if (!weights_) {
    weights_ = std::make_unique<DeviceWeights>(data, info.weights);
    state_ = info.state;
    own_pool_ = info.own_pool;
    weight_specs_ = info.weights;
  }
  check_shared(info, "state", info.state, state_);
  check_shared(info, "weight", info.weights, weight_specs_);
}

Session& Context::session() {
  if (Session* active = CallScope::session()) return *active;
  if (!own_session_) own_session_ = new_session(own_pool_);
  return *own_session_;
}

void Context::forget(const CompiledMethod& method) {
  if (own_session_) own_session_->forget(method);
}

}  // namespace et_moe::cuda
