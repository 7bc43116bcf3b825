#include "backends/cuda/runtime/session.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "backends/cuda/runtime/alignment.h"

namespace et_moe::cuda {

std::vector<int64_t> Drawn::all(int64_t later) const {
  std::vector<int64_t> all;
  for (size_t i = 0; i < positions.size(); ++i) {
    const int64_t* own = values(i, later);
    all.insert(all.end(), own, own + width);
  }
  return all;
}

void Drawn::advance(const std::vector<int64_t>& values) {
  for (size_t i = 0; i < positions.size(); ++i) {
    positions[i] += drafts ? values[i * width] + 1 : 1;
  }
}

Calls::Calls(size_t inputs_size, int64_t sequences, const std::optional<HandOverIndices>& hand_over)
    : staging(std::max(kAlignment, inputs_size)), inputs(std::max(kAlignment, inputs_size)) {
  if (hand_over) drawn.emplace(sequences, *hand_over);
}

Session::Session(const Stream& stream, const std::vector<StateSpec>& state,
                 const PoolSizes& sizes) {
  // Tensors with slots that are made alike lie behind each other, so that few calls zero a slot.
  const auto kind = [&sizes](const StateSpec& spec) {
    const bool slots = spec.pool == Pool::kSlots;
    return std::tuple(spec.pool, spec.nbytes_each(),
                      slots ? spec.version_bytes(sizes.versions).step : 0);
  };
  std::vector<StateSpec> order(state);
  std::stable_sort(order.begin(), order.end(),
                   [&kind](const StateSpec& a, const StateSpec& b) { return kind(a) < kind(b); });
  size_t end = 0;
  for (const StateSpec& tensor : order) {
    const TensorSpec spec = tensor.in(sizes);
    const size_t size = aligned(spec.nbytes());
    tensors_[tensor.name] = {spec, end};
    if (tensor.pool == Pool::kSlots) {
      const VersionBytes version = tensor.version_bytes(sizes.versions);
      if (slots_.empty() || slots_.back().slot_size != tensor.nbytes_each() ||
          slots_.back().version.step != version.step) {
        slots_.push_back({end, tensor.nbytes_each(), size, 0, version});
      }
      ++slots_.back().count;
    }
    end += size;
  }
  memory_ = DeviceBuffer(std::max(kAlignment, end));
  ET_MOE_CUDA(cudaMemsetAsync(memory_.data(), 0, memory_.size(), stream.get()));
}

Session::~Session() { wait(); }  // what still runs uses the memory that is freed here

void Session::wait() const {
  if (ahead_) cudaEventSynchronize(ahead_->drawn->done(ahead_->drawn->calls).get());
}

std::vector<int64_t> Session::settle() {
  const Calls* calls = std::exchange(ahead_, nullptr);
  if (!calls) return {};
  calls->drawn->done(calls->drawn->calls).synchronize();
  return calls->drawn->all(0);
}

template <typename Use>
void Session::each_slot(int32_t slot, const Use& use) const {
  // The longest distance of two rows that CUDA takes.
  constexpr size_t kMostPitch = INT32_MAX;
  for (const Slots& slots : slots_) {
    const bool at_once = slots.tensor_size <= kMostPitch;
    for (size_t i = 0; i < (at_once ? 1 : slots.count); ++i) {
      const size_t offset =
          slots.offset + i * slots.tensor_size + static_cast<size_t>(slot) * slots.slot_size;
      use(slots, offset, at_once ? slots.tensor_size : slots.slot_size, at_once ? slots.count : 1);
    }
  }
}

void Session::clear_slot(const Stream& stream, int32_t slot) {
  each_slot(slot, [&](const Slots& slots, size_t offset, size_t pitch, size_t height) {
    ET_MOE_CUDA(cudaMemset2DAsync(memory_.data() + offset, pitch, 0, slots.slot_size, height,
                                  stream.get()));
  });
}

void Session::copy_slot(const Stream& stream, int32_t from, int64_t version, int32_t to) {
  each_slot(from, [&](const Slots& slots, size_t offset, size_t pitch, size_t height) {
    std::byte* slot = memory_.data() + offset;
    std::byte* target = slot + (to - from) * static_cast<std::ptrdiff_t>(slots.slot_size);
    const std::byte* source = slot + static_cast<size_t>(version) * slots.version.step;
    ET_MOE_CUDA(cudaMemcpy2DAsync(target, pitch, source, pitch, slots.version.size, height,
                                  cudaMemcpyDeviceToDevice, stream.get()));
  });
}

void Session::forget(const CompiledMethod& method) {
  const auto calls = calls_.find(&method);
  if (calls == calls_.end()) return;
  if (ahead_ == &calls->second) {
    wait();
    ahead_ = nullptr;
  }
  calls_.erase(calls);
}

}  // namespace et_moe::cuda
