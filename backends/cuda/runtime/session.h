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
struct Calls {
  /// A captured call and where on the GPU it leaves its logits.
  struct Captured {
    Graph graph;
    const std::byte* logits;
  };

  /// `size`: of the inputs in bytes.
  explicit Calls(size_t size) : staging(size), inputs(size), drawn(2 * sizeof(int64_t)) {}

  /// The token that the call at a position drew, once it is done.
  int64_t token(int64_t position) const {
    return reinterpret_cast<const int64_t*>(drawn.data())[position & 1];
  }

  /// Recorded behind the call at a position.
  const Event& done(int64_t position) const { return done_[position & 1]; }

  PinnedBuffer staging;                // inputs on their way to the GPU
  DeviceBuffer inputs;                 // a call of one token leaves here those of the next
  PinnedBuffer drawn;                  // the tokens of the last two positions, by position % 2
  int64_t position = 0;                // of the last call that was started
  const std::byte* logits = nullptr;   // where on the GPU it leaves them
  std::set<int64_t> warm;              // lengths run once without a graph
  std::map<int64_t, Captured> graphs;  // by length

 private:
  Event done_[2];
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
