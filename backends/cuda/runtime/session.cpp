#include "backends/cuda/runtime/session.h"

#include <algorithm>
#include <utility>

#include "backends/cuda/runtime/alignment.h"

namespace et_moe::cuda {

Calls::Calls(size_t inputs_size, bool hands_over)
    : staging(std::max(kAlignment, inputs_size)), inputs(std::max(kAlignment, inputs_size)) {
  if (hands_over) drawn.emplace();
}

Session::Session(const Stream& stream, const std::vector<TensorSpec>& state) {
  const std::vector<size_t> offsets = aligned_offsets(state);
  for (size_t i = 0; i < state.size(); ++i) offsets_[state[i].name] = offsets[i];
  memory_ = DeviceBuffer(std::max(kAlignment, offsets.back()));
  reset(stream);
}

Session::~Session() { wait(); }  // what still runs uses the memory that is freed here

void Session::wait() const {
  if (ahead_) cudaEventSynchronize(ahead_->drawn->done(ahead_->drawn->position).get());
}

void Session::settle() {
  if (Calls* calls = std::exchange(ahead_, nullptr)) {
    calls->drawn->done(calls->drawn->position).synchronize();
  }
}

void Session::reset(const Stream& stream) {
  // A token that nobody asked for in the end is waited for: its inputs are about to be overwritten.
  settle();
  ET_MOE_CUDA(cudaMemsetAsync(memory_.data(), 0, memory_.size(), stream.get()));
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
