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
  void allocate(const PoolSizes& sizes) override;
  void clear_slot(int32_t slot) override;
  void copy_slot(int32_t from, int64_t version, int32_t to) override;
  std::vector<const void*> run(const Call& call) override;
  std::vector<int64_t> settle() override;
  std::optional<llm::GpuMemory> memory() const override;

 private:
  std::string files_;  // program and weights, for messages
  std::shared_ptr<cuda::Context> context_;
  std::map<std::string, std::unique_ptr<LoadedMethod>> methods_;
  std::unique_ptr<cuda::Session> session_;  // which has the state
  llm::GpuMemory memory_;
};

}  // namespace et_moe
