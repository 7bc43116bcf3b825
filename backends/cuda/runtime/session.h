// The state of one sequence on the GPU, and the calls that are made on it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/metadata.h"

namespace et_moe::cuda {

class CompiledMethod;

/// The tokens that a method with a hand-over drew, as the host sees them.
struct Drawn {
  Drawn() : memory(2 * sizeof(int64_t)) {}

  /// The token that the call at a position drew, once it is done.
  int64_t token(int64_t at) const {
    return reinterpret_cast<const int64_t*>(memory.data())[at & 1];
  }

  /// Recorded behind the call at a position.
  const Event& done(int64_t at) const { return events[at & 1]; }

  PinnedBuffer memory;   // int64 [2]: of the last two positions, by position % 2
  Event events[2];       // likewise
  int64_t position = 0;  // of the last call that was started
};

/// What the calls of one method on one session keep: inputs, where outputs are, graphs.
struct Calls {
  /// Where on the GPU a call leaves its outputs, in the order of the method's. They are in scratch
  /// memory, which keeps them until the next call of any method.
  using Outputs = std::vector<const std::byte*>;

  /// A captured call.
  struct Captured {
    Graph graph;
    Outputs outputs;
  };

  Calls(size_t inputs_size, bool hands_over);

  PinnedBuffer staging;                // inputs on their way to the GPU
  DeviceBuffer inputs;                 // a call that hands over leaves here those of the next
  int64_t length = 1;                  // of the last call that was started, padded
  Outputs outputs;                     // of that call
  std::optional<Drawn> drawn;          // of a method with a hand-over
  std::set<int64_t> warm;              // lengths run once without a graph
  std::map<int64_t, Captured> graphs;  // by length
};

/// KV cache, convolution and recurrent state of a sequence, and the graphs captured on them: a
/// graph has the addresses of its state in it.
class Session {
 public:
  /// Allocates the state, zeroed. Throws CudaError.
  Session(const Stream& stream, const std::vector<TensorSpec>& state);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Zeroes the state: the next token starts a new sequence.
  void reset(const Stream& stream);

  /// Whether a call was started that nobody has asked for yet, see `CallOptions::run_ahead`. It has
  /// updated the state.
  bool runs_ahead() const { return ahead_ != nullptr; }
  /// Waits for that call and gives up the token it drew; the next call may be any.
  void settle();

  /// Address of a state tensor. Throws std::out_of_range for a name that is none.
  std::byte* at(const std::string& name) const { return memory_.data() + offsets_.at(name); }

  /// Drops what is kept for a method that goes.
  void forget(const CompiledMethod& method);

 private:
  friend class CompiledMethod;
  /// Waits for the call that runs ahead, if there is one, whatever becomes of it.
  void wait() const;

  std::map<std::string, size_t> offsets_;
  DeviceBuffer memory_;
  std::map<const CompiledMethod*, Calls> calls_;
  Calls* ahead_ = nullptr;  // whose last call runs before it was asked for
};

}  // namespace et_moe::cuda
