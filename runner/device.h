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

/// Runs the methods of one program, and has the state of all sequences: KV cache, convolution and
/// recurrent state. Not thread-safe. Everything throws std::runtime_error that names the files, but
/// `allocate`, whose caller knows them, and says what went wrong.
class Device {
 public:
  virtual ~Device() = default;

  /// Loads the methods that `bindings` names; to be called once, before anything below. Program and
  /// weights must outlive the device.
  virtual void load(const ProgramFile& program, const Bindings& bindings,
                    const Weights& weights) = 0;

  /// Allocates the state, zeroed, in place of what was allocated before; to be called before
  /// anything below.
  virtual void allocate(const PoolSizes& sizes) = 0;
  /// Zeroes a slot, in which a new sequence begins. What pages hold does not matter to it.
  virtual void clear_slot(int32_t slot) = 0;
  /// Makes version 0 of a slot a copy of a version of another; see `PoolSizes`.
  virtual void copy_slot(int32_t from, int64_t version, int32_t to) = 0;

  /// One call. Returns the addresses in host memory of the outputs that are wanted, in the order of
  /// `call.outputs`; they are valid until the next call of the method.
  virtual std::vector<const void*> run(const Call& call) = 0;
  /// Waits for a call that runs ahead, see `Call::run_ahead`, and returns the values of the output
  /// that it hands over: `token` or `step`. None if no call runs ahead.
  virtual std::vector<int64_t> settle() = 0;

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
