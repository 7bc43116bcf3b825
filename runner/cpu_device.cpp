#include "runner/cpu_device.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace et_moe {
namespace {

constexpr size_t kAlignment = 64;

class CpuState final : public SequenceState {
 public:
  explicit CpuState(const std::vector<TensorSpec>& state) {
    for (const TensorSpec& spec : state) {
      const size_t size = (spec.nbytes() + kAlignment - 1) / kAlignment * kAlignment;
      buffers_.emplace_back(std::aligned_alloc(kAlignment, size));
      if (!buffers_.back()) throw std::runtime_error("out of memory for the state " + spec.name);
      sizes_.push_back(size);
    }
    reset();
  }

  bool runs_ahead() const override { return false; }
  void reset() {
    for (size_t i = 0; i < buffers_.size(); ++i) std::memset(buffers_[i].get(), 0, sizes_[i]);
  }
  void* data(size_t i) const { return buffers_[i].get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<void, Free>> buffers_;
  std::vector<size_t> sizes_;
};

}  // namespace

void CpuDevice::load(const ProgramFile& program, const Bindings& bindings, const Weights& weights) {
  state_ = bindings.state;
  std::vector<TensorSpec> bound = bindings.state;
  bound.insert(bound.end(), bindings.weights.begin(), bindings.weights.end());
  for (const auto& [name, spec] : bindings.methods) {
    auto method = program.load_method(name, spec, bound);
    const size_t first = spec.inputs.size() + state_.size();
    for (size_t i = 0; i < bindings.weights.size(); ++i) {
      const TensorSpec& weight = bindings.weights[i];
      method->set_argument(first + i, weight.name, weight.dtype, weight.shape, weights.data(i));
    }
    methods_[name] = std::move(method);
  }
}

std::unique_ptr<SequenceState> CpuDevice::new_state() { return std::make_unique<CpuState>(state_); }

void CpuDevice::reset(SequenceState& state) { static_cast<CpuState&>(state).reset(); }

std::vector<const void*> CpuDevice::run(SequenceState& state, const Call& call) {
  LoadedMethod& method = *methods_.at(call.method);
  for (size_t i = 0; i < state_.size(); ++i) {
    method.set_argument(method.spec().inputs.size() + i, state_[i].name, state_[i].dtype,
                        state_[i].shape, static_cast<CpuState&>(state).data(i));
  }
  return method.run(call);
}

}  // namespace et_moe
