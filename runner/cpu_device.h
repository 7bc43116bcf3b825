// Runs a program for the CPU: binds state and weights as arguments of its methods.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runner/device.h"

namespace et_moe {

/// A method of a CPU program takes its inputs, then the state, then the weights.
class CpuDevice final : public Device {
 public:
  void load(const ProgramFile& program, const Bindings& bindings, const Weights& weights) override;
  std::unique_ptr<SequenceState> new_state() override;
  void reset(SequenceState& state) override;
  void settle(SequenceState&) override {}
  std::vector<const void*> run(SequenceState& state, const Call& call) override;
  std::optional<llm::GpuMemory> memory() const override { return std::nullopt; }

 private:
  std::vector<TensorSpec> state_;
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
};

}  // namespace et_moe
