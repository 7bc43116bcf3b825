#include "backends/cuda/runtime/session.h"

#include <algorithm>
#include <utility>

#include "backends/cuda/runtime/alignment.h"

namespace et_moe::cuda {

Session::Session(const Stream& stream, const std::vector<TensorInfo>& state) {
  const std::vector<size_t> offsets = aligned_offsets(state);
  for (size_t i = 0; i < state.size(); ++i) offsets_[state[i].name] = offsets[i];
  memory_ = DeviceBuffer(std::max(kAlignment, offsets.back()));
  reset(stream);
}

Session::~Session() {
  // What still runs uses the memory that is freed here.
  if (ahead_) cudaEventSynchronize(ahead_->done(ahead_->position).get());
}

void Session::reset(const Stream& stream) {
  // A token that nobody asked for in the end is waited for: its inputs are about to be overwritten.
  if (Calls* calls = std::exchange(ahead_, nullptr)) calls->done(calls->position).synchronize();
  ET_MOE_CUDA(cudaMemsetAsync(memory_.data(), 0, memory_.size(), stream.get()));
}

}  // namespace et_moe::cuda
