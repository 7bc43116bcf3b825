// The state of one sequence on the GPU, and the calls that are made on it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/metadata.h"

namespace et_moe::cuda {

class CompiledMethod;

/// What the calls of one method on one session keep: inputs, drawn tokens, graphs.
///
/// Two slots take turns, so that a call can wait on the stream for the one before it to end: the
/// host then does not touch the memory of either.
struct Calls {
  struct Slot {
    explicit Slot(size_t inputs) : memory(inputs + sizeof(int64_t)) {}
    PinnedBuffer memory;  // inputs at the offsets of the method, then the token that comes back
    Event done;
    const std::byte* logits = nullptr;  // where on the GPU the call leaves them
  };
  /// A captured call and where it leaves its logits.
  struct Captured {
    Graph graph;
    const std::byte* logits;
  };

  /// `size`: of the inputs in bytes.
  explicit Calls(size_t size) : slots{Slot(size), Slot(size)}, inputs(size) {}

  Slot slots[2];
  int last = 0;                                        // slot of the last call
  DeviceBuffer inputs;                                 // at the same offsets
  std::set<int64_t> warm;                              // lengths run once without a graph
  std::map<std::pair<int64_t, int>, Captured> graphs;  // by length and slot
};

/// KV cache, convolution and recurrent state of a sequence, and the graphs captured on them: a
/// graph has the addresses of its state in it.
class Session {
 public:
  /// Allocates the state, zeroed.
  Session(const Stream& stream, const std::vector<TensorInfo>& state);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Zeroes the state: the next token starts a new sequence.
  void reset(const Stream& stream);

  /// Address of a state tensor. Throws std::out_of_range for a name that is none.
  std::byte* at(const std::string& name) const { return memory_.data() + offsets_.at(name); }

 private:
  friend class CompiledMethod;
  std::map<std::string, size_t> offsets_;
  DeviceBuffer memory_;
  std::map<const CompiledMethod*, Calls> calls_;
  Calls* ahead_ = nullptr;  // whose last call runs before it was asked for
};

}  // namespace et_moe::cuda
