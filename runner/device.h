// What the engine needs of a device; cpu_device.* and cuda_device.* are those that there are.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/bindings.h"
#include "runner/call.h"
#include "runner/program.h"
#include "runner/stats.h"
#include "runner/weights.h"

namespace et_moe {

/// The state of one sequence, in the memory of a device: KV cache, convolution and recurrent state.
class SequenceState {
 public:
  virtual ~SequenceState() = default;
  /// Whether a call was begun that nobody has asked for yet, see `Call::run_ahead`. Its token is
  /// part of the state.
  virtual bool runs_ahead() const = 0;
};

/// Runs the methods of one program. Not thread-safe. Everything throws std::runtime_error with the
/// program's file and what went wrong.
class Device {
 public:
  virtual ~Device() = default;

  /// Loads the methods that `bindings` names; to be called once, before anything below. Program and
  /// weights must outlive the device.
  virtual void load(const ProgramFile& program, const Bindings& bindings,
                    const Weights& weights) = 0;

  /// Zeroed state for one more sequence; it must go before the device.
  virtual std::unique_ptr<SequenceState> new_state() = 0;
  /// Zeroes the state: its next token starts a new sequence.
  virtual void reset(SequenceState& state) = 0;
  /// Waits for a call that runs ahead and gives up the token that it draws.
  virtual void settle(SequenceState& state) = 0;

  /// One call on a sequence. Returns the addresses in host memory of the outputs that are wanted,
  /// in the order of `call.outputs`; they are valid until the next call of the method.
  virtual std::vector<const void*> run(SequenceState& state, const Call& call) = 0;

  /// Memory before and after `load`, and now; nothing where it is not the device's own.
  virtual std::optional<llm::GpuMemory> memory() const = 0;
};

/// How a program is run.
struct DeviceOptions {
  bool cuda_graph = false;  // capture and replay CUDA graphs; the CPU ignores it
};

/// The device that a program names with `get_backend`: "cpu" or "cuda". Throws std::runtime_error
/// for another one, for one that this runner was built without, or where there is no such device.
std::unique_ptr<Device> make_device(const std::string& backend, const DeviceOptions& options);

}  // namespace et_moe
