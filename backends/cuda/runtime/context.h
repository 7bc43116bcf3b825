// What the methods of one program share on the GPU.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <memory>
#include <vector>

#include "backends/cuda/runtime/arena.h"
#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/device_weights.h"
#include "backends/cuda/runtime/metadata.h"
#include "backends/cuda/runtime/session.h"

namespace et_moe::cuda {

class CompiledMethod;

/// Shared by the methods of a program: weights, scratch memory, stream, and which session runs.
///
/// A program that uses ExecuTorch's API alone gets one context of its own per process; one that
/// wants several models or sessions makes contexts and activates them around `load_method` and
/// `execute`.
class Context {
 public:
  /// Throws std::runtime_error where there is no driver or GPU to run on.
  Context();
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// While this lives, methods that are loaded or executed on this thread use the context and, for
  /// execution, the session.
  class Scope {
   public:
    explicit Scope(Context& context, Session* session = nullptr);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Context* previous_;
  };

  /// The active context, else the process's own.
  static Context& current();

  std::unique_ptr<Session> new_session() const;
  void reset(Session& session) const { session.reset(stream_); }

  /// Whether calls are captured into CUDA graphs, one per method and length, and replayed.
  bool use_graphs = false;
  /// Whether logits are copied to the method's output, which else stays as it is.
  bool copy_logits = false;
  /// Whether a call of one token is followed at once by that of the next position, on the token it
  /// draws and with the same further inputs: the GPU goes on while the caller looks at the token.
  /// The session then takes that call next, or a reset. Not where logits are copied.
  bool run_ahead = false;

 private:
  friend class CompiledMethod;
  void adopt(const executorch::runtime::NamedDataMap& data, const MethodInfo& info);
  Session& session();

  Stream stream_;
  Arena arena_;
  std::unique_ptr<DeviceWeights> weights_;
  std::vector<TensorInfo> state_;
  std::unique_ptr<Session> own_session_;  // for callers that never made one
  Session* session_ = nullptr;
};

}  // namespace et_moe::cuda
