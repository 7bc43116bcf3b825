// What the methods of one program share on the GPU.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <memory>
#include <vector>

#include "backends/cuda/runtime/arena.h"
#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/device_weights.h"
#include "backends/cuda/runtime/kernels.h"
#include "backends/cuda/runtime/metadata.h"
#include "backends/cuda/runtime/session.h"

namespace et_moe::cuda {

class CompiledMethod;

/// Weights, kernels, scratch memory and stream, shared by the methods of a program, each of which
/// keeps it alive. Calls of methods and sessions of one context are made by one thread at a time.
class Context {
 public:
  /// `use_graphs`: whether calls are captured into CUDA graphs, one per session, method and length,
  /// and replayed. Throws DelegateError where there is no driver or GPU to run on.
  explicit Context(bool use_graphs = false);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// The context for a method that is being loaded: that of the active LoadScope; else the one that
  /// the other methods of the same program have, or a new one. `data` has the program's code and
  /// its weights. Programs are told apart by the memory that these lie in: each load of a file is
  /// another one, even of the same file. May be called by several threads. Throws DelegateError.
  static std::shared_ptr<Context> of(const executorch::runtime::NamedDataMap& data);

  /// State of sequences, as the methods that are loaded so far need it. It must go before they do.
  /// Throws CudaError.
  std::unique_ptr<Session> new_session(const PoolSizes& sizes) const;
  void clear_slot(Session& session, int32_t slot) const { session.clear_slot(stream_, slot); }
  void copy_slot(Session& session, int32_t from, int64_t version, int32_t to) const {
    session.copy_slot(stream_, from, version, to);
  }

 private:
  friend class CompiledMethod;
  /// Takes over what a method needs of the data: checks its layout, and uploads the weights if this
  /// is the first. Throws DelegateError (InvalidExternalData).
  void adopt(const executorch::runtime::NamedDataMap& data, const MethodInfo& info);
  /// The session of the active CallScope, else the context's own.
  Session& session();
  /// Drops what the context's own session keeps for a method that goes.
  void forget(const CompiledMethod& method);

  const bool use_graphs_;
  Stream stream_;
  Arena arena_;
  Kernels kernels_;
  std::unique_ptr<DeviceWeights> weights_;
  std::vector<StateSpec> state_;
  PoolSizes own_pool_;
  std::vector<TensorSpec> weight_specs_;
  const Calls* last_ = nullptr;  // whose call was started last: it owns what is in scratch memory
  std::unique_ptr<Session> own_session_;  // for callers that never made one
};

}  // namespace et_moe::cuda
