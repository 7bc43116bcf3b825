// Runs a program for the CPU: binds state and weights as arguments of its methods.
#pragma once

#include <cstdlib>
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
  void allocate(const PoolSizes& sizes) override;
  void clear_slot(int32_t slot) override;
  void copy_slot(int32_t from, int64_t version, int32_t to) override;
  std::vector<const void*> run(const Call& call) override;
  std::vector<int64_t> settle() override { return {}; }
  std::optional<llm::GpuMemory> memory() const override { return std::nullopt; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  /// Calls `use` with each tensor that has slots, and the address of its slots.
  template <typename Use>
  void each_slots(const Use& use) const;

  PoolSizes sizes_;
  std::vector<StateSpec> state_;
  std::vector<std::unique_ptr<void, Free>> buffers_;  // of `state_`
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
};

}  // namespace et_moe
