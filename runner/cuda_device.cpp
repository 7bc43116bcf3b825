#include "runner/cuda_device.h"

#include "backends/cuda/runtime/scope.h"

namespace et_moe {
namespace {

class CudaState final : public SequenceState {
 public:
  explicit CudaState(std::unique_ptr<cuda::Session> session) : session_(std::move(session)) {}
  bool runs_ahead() const override { return session_->runs_ahead(); }
  cuda::Session& session() { return *session_; }

 private:
  std::unique_ptr<cuda::Session> session_;
};

cuda::Session& session_of(SequenceState& state) { return static_cast<CudaState&>(state).session(); }

}  // namespace

CudaDevice::CudaDevice(bool use_graphs) : context_(std::make_shared<cuda::Context>(use_graphs)) {
  const cuda::MemoryInfo memory = cuda::memory_info();
  memory_.total = static_cast<int64_t>(memory.total);
  memory_.free_before_load = static_cast<int64_t>(memory.free);
}

void CudaDevice::load(const ProgramFile& program, const Bindings& bindings,
                      const Weights& weights) {
  const cuda::LoadScope scope(context_);
  for (const auto& [name, spec] : bindings.methods) {
    methods_[name] = program.load_method(name, spec, /*bound=*/{}, &weights.map());
  }
  memory_.free_after_load = static_cast<int64_t>(cuda::memory_info().free);
}

std::unique_ptr<SequenceState> CudaDevice::new_state() {
  return std::make_unique<CudaState>(context_->new_session());
}

void CudaDevice::reset(SequenceState& state) { context_->reset(session_of(state)); }

void CudaDevice::settle(SequenceState& state) { session_of(state).settle(); }

std::vector<const void*> CudaDevice::run(SequenceState& state, const Call& call) {
  const cuda::CallScope scope(session_of(state), {&call.outputs, call.run_ahead});
  return methods_.at(call.method)->run(call);
}

std::optional<llm::GpuMemory> CudaDevice::memory() const {
  llm::GpuMemory memory = memory_;
  memory.free_after_generate = static_cast<int64_t>(cuda::memory_info().free);
  return memory;
}

}  // namespace et_moe
