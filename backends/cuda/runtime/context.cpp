#include "backends/cuda/runtime/context.h"

#include <stdexcept>
#include <string_view>

namespace et_moe::cuda {
namespace {

constexpr char kLayout[] = "et_moe.layout";  // LAYOUT of backends/sealed_file.py
thread_local Context* active = nullptr;

/// Opens the driver before any member of a context makes a CUDA call.
struct DriverOpened {
  DriverOpened() { open_driver(); }
};

}  // namespace

Context::Context() : stream_((DriverOpened(), Stream())) {}

Context::~Context() = default;

Context::Scope::Scope(Context& context, Session* session) : previous_(active) {
  context.session_ = session;
  active = &context;
}

Context::Scope::~Scope() {
  active->session_ = nullptr;
  active = previous_;
}

Context& Context::current() {
  if (active) return *active;
  static Context own;
  return own;
}

std::unique_ptr<Session> Context::new_session() const {
  return std::make_unique<Session>(stream_, state_);
}

void Context::adopt(const executorch::runtime::NamedDataMap& data, const MethodInfo& info) {
  const auto layout = data.get_data(kLayout);
  const std::string_view have(layout.ok() ? static_cast<const char*>(layout->data()) : "",
                              layout.ok() ? layout->size() : 0);
  if (have != info.prepack) {
    throw std::runtime_error("the weights are prepacked as \"" + std::string(have) +
                             "\", the program takes \"" + info.prepack +
                             "\": export program and weights with one version of et-moe, for CUDA");
  }
  if (!weights_) {
    weights_ = std::make_unique<DeviceWeights>(data, info.weights);
    state_ = info.state;
  }
}

Session& Context::session() {
  if (session_) return *session_;
  if (!own_session_) own_session_ = new_session();
  return *own_session_;
}

}  // namespace et_moe::cuda
