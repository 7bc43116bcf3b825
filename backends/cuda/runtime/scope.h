// What a thread says of the loads and calls that it makes through ExecuTorch's API, which has no
// place for it. A program that says nothing gets defaults.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace et_moe::cuda {

class Context;
class Session;

/// How one call is made.
struct CallOptions {
  /// Names of the outputs that are brought to the host, where others keep what they held; null for
  /// all. Owned by the caller.
  const std::vector<std::string>* outputs = nullptr;
  /// Whether the call is followed at once by the next one, on the tokens that it draws and
  /// otherwise the same inputs: the GPU goes on while the caller looks at the tokens. The session
  /// then takes that call next, or is settled. Of a method without a hand-over nothing follows.
  bool run_ahead = false;
};

/// While this lives, methods that are loaded on this thread share the context; without one, the
/// methods of each program share one of their own.
class LoadScope {
 public:
  explicit LoadScope(std::shared_ptr<Context> context);
  ~LoadScope();
  LoadScope(const LoadScope&) = delete;
  LoadScope& operator=(const LoadScope&) = delete;

  /// Null if none is active.
  static std::shared_ptr<Context> context();

 private:
  std::shared_ptr<Context> previous_;
};

/// While this lives, methods that are executed on this thread work on the session, which must be
/// one of their context's; without one, on the only session that their context has by itself.
class CallScope {
 public:
  CallScope(Session& session, const CallOptions& options);
  ~CallScope();
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

  /// Null if none is active.
  static Session* session();
  static const CallOptions& options();

 private:
  Session* previous_session_;
  CallOptions previous_options_;
};

}  // namespace et_moe::cuda
