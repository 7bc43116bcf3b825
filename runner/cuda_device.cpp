#include "runner/cuda_device.h"

#include "backends/cuda/runtime/scope.h"
#include "runner/errors.h"

namespace et_moe {
CudaDevice::CudaDevice(bool use_graphs) : context_(std::make_shared<cuda::Context>(use_graphs)) {
  const cuda::MemoryInfo memory = cuda::memory_info();
  memory_.total = static_cast<int64_t>(memory.total);
  memory_.free_before_load = static_cast<int64_t>(memory.free);
}

void CudaDevice::load(const ProgramFile& program, const Bindings& bindings,
                      const Weights& weights) {
  files_ = both_files(program.path(), weights.path());
  const cuda::LoadScope scope(context_);
  for (const auto& [name, spec] : bindings.methods) {
    methods_[name] = program.load_method(name, spec, /*bound=*/{}, weights.path(), &weights.map());
  }
  memory_.free_after_load = static_cast<int64_t>(cuda::memory_info().free);
}

void CudaDevice::allocate(const PoolSizes& sizes) {
  session_.reset();  // before there is memory for another
  session_ = context_->new_session(sizes);
}

// What a method did wrong can show in a later call of the driver, whatever that is for.

void CudaDevice::clear_slot(int32_t slot) {
  in_context(files_, [&] { context_->clear_slot(*session_, slot); });
}

void CudaDevice::copy_slot(int32_t from, int64_t version, int32_t to) {
  in_context(files_, [&] { context_->copy_slot(*session_, from, version, to); });
}

std::vector<const void*> CudaDevice::run(const Call& call) {
  const cuda::CallScope scope(*session_, {&call.outputs, call.run_ahead});
  return methods_.at(call.method)->run(call);
}

std::vector<int64_t> CudaDevice::settle() {
  return in_context(files_, [&] { return session_->settle(); });
}

std::optional<llm::GpuMemory> CudaDevice::memory() const {
  llm::GpuMemory memory = memory_;
  memory.free_after_generate = static_cast<int64_t>(cuda::memory_info().free);
  return memory;
}

}  // namespace et_moe
