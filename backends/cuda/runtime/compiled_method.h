// A method's compiled code: loaded, given its tensors, and run, eagerly or as a CUDA graph.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "backends/cuda/runtime/container.h"
#include "backends/cuda/runtime/context.h"
#include "backends/cuda/runtime/metadata.h"

namespace et_moe::cuda {

/// A call's tensors on the host, contiguous, in the order of `MethodInfo::spec`.
struct HostTensors {
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  int64_t length = 1;  // of the dimension that varies from call to call, wherever it occurs
};

class CompiledMethod {
 public:
  /// Loads the code for this GPU, after checking its digest, and the weights if the method's
  /// context has none yet. Throws DelegateError.
  CompiledMethod(MethodInfo info, const executorch::runtime::NamedDataMap& data);
  ~CompiledMethod();
  CompiledMethod(const CompiledMethod&) = delete;
  CompiledMethod& operator=(const CompiledMethod&) = delete;

  const MethodInfo& info() const { return info_; }

  /// One call, with the session and the options of the active CallScope: fills the outputs that are
  /// wanted, and always the token that is handed over. Inputs of varying length are padded with
  /// zeros to one of a few lengths, and run by the code for it. Throws DelegateError: InvalidState
  /// if the session runs ahead with another call, else what CUDA or the code says.
  void run(const HostTensors& tensors);

 private:
  /// The code for the lengths above those of the range before.
  struct Range {
    int64_t longest;
    std::unique_ptr<Container> code;
  };

  /// Runs the code on the inputs that are on the GPU; returns where its outputs are.
  Calls::Outputs enqueue(Session& session, const Calls& calls);
  /// Starts the call of calls.length, on the inputs that are on the GPU, as a graph if it may be
  /// one.
  void launch(Session& session, Calls& calls);
  /// The same as a graph, which is captured if there is none of this length. False if that failed.
  bool launch_graph(Session& session, Calls& calls);
  /// Brings inputs to the GPU and starts the call.
  void start(Session& session, Calls& calls, const HostTensors& tensors);
  /// Whether these inputs are those of the last call that was started, one that runs ahead.
  bool is_last(const Calls& calls, const HostTensors& tensors) const;
  /// Where in their memory the inputs of a call of a length begin, and the end of the last.
  std::vector<size_t> offsets(int64_t length) const;
  /// Starts copies of the outputs that are wanted, but for a token that is handed over; whether
  /// there are any.
  bool copy_outputs(const Calls& calls, const HostTensors& tensors) const;
  /// The range that a length lies in.
  const Range& range_of(int64_t length) const;
  /// The length that a call of `length` is padded to; it lies in the same range.
  int64_t bucket(int64_t length) const;

  MethodInfo info_;
  std::shared_ptr<Context> context_;
  std::vector<Range> ranges_;  // by rising length; the last one ends with the longest
  bool capture_failed_ = false;
};

}  // namespace et_moe::cuda
