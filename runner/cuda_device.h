// Runs a program for CUDA, by the delegate of backends/cuda/runtime.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backends/cuda/runtime/context.h"
#include "runner/device.h"

namespace et_moe {

/// A method of a CUDA program takes its inputs; the delegate binds state and weights.
class CudaDevice final : public Device {
 public:
  /// Throws std::runtime_error where there is no driver or GPU to run on.
  explicit CudaDevice(bool use_graphs);

  void load(const ProgramFile& program, const Bindings& bindings, const Weights& weights) override;
  std::unique_ptr<SequenceState> new_state() override;
  void reset(SequenceState& state) override;
  void settle(SequenceState& state) override;
  std::vector<const void*> run(SequenceState& state, const Call& call) override;
  std::optional<llm::GpuMemory> memory() const override;

 private:
  std::shared_ptr<cuda::Context> context_;
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
  llm::GpuMemory memory_;
};

}  // namespace et_moe
