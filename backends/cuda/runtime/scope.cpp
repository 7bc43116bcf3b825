#include "backends/cuda/runtime/scope.h"

#include <utility>

namespace et_moe::cuda {
namespace {

thread_local std::shared_ptr<Context> active_context;
thread_local Session* active_session = nullptr;
thread_local CallOptions active_options;

}  // namespace

LoadScope::LoadScope(std::shared_ptr<Context> context)
    : previous_(std::exchange(active_context, std::move(context))) {}

LoadScope::~LoadScope() { active_context = std::move(previous_); }

std::shared_ptr<Context> LoadScope::context() { return active_context; }

CallScope::CallScope(Session& session, const CallOptions& options)
    : previous_session_(std::exchange(active_session, &session)),
      previous_options_(std::exchange(active_options, options)) {}

CallScope::~CallScope() {
  active_session = previous_session_;
  active_options = previous_options_;
}

Session* CallScope::session() { return active_session; }

const CallOptions& CallScope::options() { return active_options; }

}  // namespace et_moe::cuda
