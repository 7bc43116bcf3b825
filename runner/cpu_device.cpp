#include "runner/cpu_device.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace et_moe {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

void CpuDevice::load(const ProgramFile& program, const Bindings& bindings, const Weights& weights) {
  state_ = bindings.state;
  std::vector<TensorSpec> bound(bindings.state.begin(), bindings.state.end());
  bound.insert(bound.end(), bindings.weights.begin(), bindings.weights.end());
  for (const auto& [name, spec] : bindings.methods) {
    auto method = program.load_method(name, spec, bound, weights.path());
    const size_t first = spec.inputs.size() + state_.size();
    for (size_t i = 0; i < bindings.weights.size(); ++i) {
      const TensorSpec& weight = bindings.weights[i];
      method->set_argument(first + i, weight.name, weight.dtype, weight.shape, weights.data(i));
    }
    methods_[name] = std::move(method);
  }
}

void CpuDevice::allocate(const PoolSizes& sizes) {
  sizes_ = sizes;
  buffers_.clear();
  for (const StateSpec& spec : state_) {
    const TensorSpec tensor = spec.in(sizes);
    const size_t size = (tensor.nbytes() + kAlignment - 1) / kAlignment * kAlignment;
    buffers_.emplace_back(std::aligned_alloc(kAlignment, size));
    if (!buffers_.back()) throw std::runtime_error("out of memory for the state " + spec.name);
    std::memset(buffers_.back().get(), 0, size);
    for (auto& [_, method] : methods_) {
      method->set_argument(method->spec().inputs.size() + buffers_.size() - 1, tensor.name,
                           tensor.dtype, tensor.shape, buffers_.back().get());
    }
  }
}

template <typename Use>
void CpuDevice::each_slots(const Use& use) const {
  for (size_t i = 0; i < state_.size(); ++i) {
    if (state_[i].pool == Pool::kSlots) use(state_[i], static_cast<char*>(buffers_[i].get()));
  }
}

void CpuDevice::clear_slot(int32_t slot) {
  each_slots([slot](const StateSpec& spec, char* slots) {
    std::memset(slots + static_cast<size_t>(slot) * spec.nbytes_each(), 0, spec.nbytes_each());
  });
}

void CpuDevice::copy_slot(int32_t from, int64_t version, int32_t to) {
  each_slots([this, from, version, to](const StateSpec& spec, char* slots) {
    const VersionBytes bytes = spec.version_bytes(sizes_.versions);
    const size_t size = spec.nbytes_each();
    std::memcpy(
        slots + static_cast<size_t>(to) * size,
        slots + static_cast<size_t>(from) * size + static_cast<size_t>(version) * bytes.step,
        bytes.size);
  });
}

std::vector<const void*> CpuDevice::run(const Call& call) {
  return methods_.at(call.method)->run(call);
}

}  // namespace et_moe
