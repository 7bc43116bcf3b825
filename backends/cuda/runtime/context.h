// What the methods of one program share on the GPU, and the sessions that run on it.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backends/cuda/runtime/arena.h"
#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/device_weights.h"
#include "backends/cuda/runtime/metadata.h"

namespace et_moe::cuda {

class CompiledMethod;

/// The state of one sequence on the GPU (KV cache, convolution and recurrent state), and the graphs
/// captured on it: a graph has the addresses of its state in it.
class Session {
 public:
  /// Allocates the state, zeroed.
  Session(const Stream& stream, const std::vector<TensorInfo>& state);

  /// Zeroes the state: the next token starts a new sequence.
  void reset(const Stream& stream);

  /// Address of a state tensor. Throws std::out_of_range for a name that is none.
  std::byte* at(const std::string& name) const { return memory_.data() + offsets_.at(name); }

 private:
  friend class CompiledMethod;
  using Key = std::pair<const CompiledMethod*, int64_t>;  // method and length of the token input
  /// A captured call and where it leaves its logits.
  struct Captured {
    Graph graph;
    const std::byte* logits;
  };

  std::map<std::string, size_t> offsets_;
  DeviceBuffer memory_;
  std::set<Key> warm_;  // run once without a graph
  std::map<Key, Captured> graphs_;
};

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
