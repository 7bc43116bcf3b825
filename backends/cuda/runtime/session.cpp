#include "backends/cuda/runtime/session.h"

#include <algorithm>
#include <utility>

#include "backends/cuda/runtime/alignment.h"

namespace et_moe::cuda {

Calls::Calls(size_t inputs_size, std::optional<int64_t> sequences)
    : staging(std::max(kAlignment, inputs_size)), inputs(std::max(kAlignment, inputs_size)) {
  if (sequences) drawn.emplace(*sequences);
}

std::vector<int64_t> Calls::tokens() const {
  std::vector<int64_t> tokens;
  for (size_t i = 0; i < drawn->positions.size(); ++i) {
    tokens.push_back(drawn->token(drawn->positions[i], i, length));
  }
  return tokens;
}

Session::Session(const Stream& stream, const std::vector<StateSpec>& state,
                 const PoolSizes& sizes) {
  // Tensors with slots of one size lie behind each other, so that few calls zero a slot.
  std::vector<StateSpec> order(state);
  std::stable_sort(order.begin(), order.end(), [](const StateSpec& a, const StateSpec& b) {
    return std::pair(a.pool, a.nbytes_each()) < std::pair(b.pool, b.nbytes_each());
  });
  size_t end = 0;
  for (const StateSpec& tensor : order) {
    const TensorSpec spec = tensor.in(sizes);
    const size_t size = aligned(spec.nbytes());
    tensors_[tensor.name] = {spec, end};
    if (tensor.pool == Pool::kSlots) {
      if (slots_.empty() || slots_.back().slot_size != tensor.nbytes_each()) {
        slots_.push_back({end, tensor.nbytes_each(), size, 0});
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
  return calls->tokens();
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
      use(offset, at_once ? slots.tensor_size : slots.slot_size, slots.slot_size,
          at_once ? slots.count : 1);
    }
  }
}

void Session::clear_slot(const Stream& stream, int32_t slot) {
  each_slot(slot, [&](size_t offset, size_t pitch, size_t width, size_t height) {
    ET_MOE_CUDA(cudaMemset2DAsync(memory_.data() + offset, pitch, 0, width, height, stream.get()));
  });
}

void Session::copy_slot(const Stream& stream, int32_t from, int32_t to) {
  each_slot(from, [&](size_t offset, size_t pitch, size_t width, size_t height) {
    std::byte* source = memory_.data() + offset;
    std::byte* target = source + (to - from) * static_cast<std::ptrdiff_t>(width);
    ET_MOE_CUDA(cudaMemcpy2DAsync(target, pitch, source, pitch, width, height,
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
