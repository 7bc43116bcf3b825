// The state of the sequences on the GPU, and the calls that are made on it.
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

/// What a method with a hand-over drew, as the host sees it: a token for each sequence or, fed
/// drafts, how many of them were accepted and the tokens of the next call.
struct Drawn {
  /// For at most so many sequences a call.
  Drawn(int64_t most, const HandOverIndices& hand_over)
      : memory(2 * sizeof(int64_t) * static_cast<size_t>(most) * hand_over.width),
        width(hand_over.width),
        drafts(hand_over.versions.has_value()) {}

  /// What a call drew for a sequence, `width` values, once it is done.
  /// `later`: how many calls were started since, 0 or 1.
  const int64_t* values(size_t sequence, int64_t later) const {
    // How far a call with drafts goes is not known when the next one starts.
    const int64_t at = (drafts ? launches : positions[sequence]) - later;
    return reinterpret_cast<const int64_t*>(memory.data()) +
           (static_cast<size_t>((at & 1) * sequences) + sequence) * width;
  }
  /// The same of all sequences that are no padding.
  std::vector<int64_t> all(int64_t later) const;
  /// Makes `positions` those of a call that was started behind one that has drawn these values.
  void advance(const std::vector<int64_t>& values);

  /// Recorded behind a call.
  const Event& done(uint64_t call) const { return events[call & 1]; }

  PinnedBuffer memory;   // int64 [2, sequences, width]: of the last two positions of each sequence,
                         // by position % 2, or of the last two calls
  Event events[2];       // of the last two calls
  uint64_t calls = 0;    // that were started: the number of the last one
  int64_t launches = 0;  // of the last one: behind how many others it follows by hand-over
  int64_t sequences = 0;           // of the last call, padded
  std::vector<int64_t> positions;  // of the last call, of the sequences that are no padding
  const size_t width;
  const bool drafts;
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

  /// `sequences`: most of a call of a method, which may have a hand-over.
  Calls(size_t inputs_size, int64_t sequences, const std::optional<HandOverIndices>& hand_over);

  PinnedBuffer staging;                // inputs on their way to the GPU
  DeviceBuffer inputs;                 // a call that hands over leaves here those of the next
  int64_t length = 1;                  // of the last call that was started, padded
  Outputs outputs;                     // of that call
  std::optional<Drawn> drawn;          // of a method with a hand-over
  std::set<int64_t> warm;              // lengths run once without a graph
  std::map<int64_t, Captured> graphs;  // by length
};

/// KV cache, convolution and recurrent state of sequences in a pool of pages and slots, and the
/// graphs captured on it: a graph has the address of the pool in it, not those of a sequence.
class Session {
 public:
  /// Allocates the state, zeroed. Throws CudaError.
  Session(const Stream& stream, const std::vector<StateSpec>& state, const PoolSizes& sizes);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Zeroes a slot, in which a new sequence begins.
  void clear_slot(const Stream& stream, int32_t slot);
  /// Makes version 0 of a slot a copy of a version of another, see `PoolSizes`.
  void copy_slot(const Stream& stream, int32_t from, int64_t version, int32_t to);

  /// Waits for a call that was started and that nobody has asked for yet, see
  /// `CallOptions::run_ahead`, and returns what it drew, see `Drawn`, for each of its sequences.
  /// None if there is no such call. The next call may be any.
  std::vector<int64_t> settle();

  /// A state tensor: what it is in this pool, and its address. Throws std::out_of_range for a name
  /// that is none.
  const TensorSpec& spec(const std::string& name) const { return tensors_.at(name).spec; }
  std::byte* at(const std::string& name) const { return memory_.data() + tensors_.at(name).offset; }

  /// Drops what is kept for a method that goes.
  void forget(const CompiledMethod& method);

 private:
  friend class CompiledMethod;
  struct Placed {
    TensorSpec spec;
    size_t offset;
  };
  /// Tensors of slots that are as large as each other and follow each other.
  struct Slots {
    size_t offset, slot_size, tensor_size, count;
    VersionBytes version;
  };
  /// Calls `use` with what they are, the offset of a slot, the distance from tensor to tensor and
  /// the number of tensors, for tensors that CUDA takes as rows of one matrix.
  template <typename Use>
  void each_slot(int32_t slot, const Use& use) const;
  /// Waits for the call that runs ahead, if there is one, whatever becomes of it.
  void wait() const;

  std::map<std::string, Placed> tensors_;
  std::vector<Slots> slots_;
  DeviceBuffer memory_;
  std::map<const CompiledMethod*, Calls> calls_;
  Calls* ahead_ = nullptr;  // whose last call runs before it was asked for
};

}  // namespace et_moe::cuda
