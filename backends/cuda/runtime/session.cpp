#include "backends/cuda/runtime/session.h"

#include <utility>

namespace et_moe::cuda {
namespace {

constexpr size_t kAlignment = 256;

}  // namespace

Session::Session(const Stream& stream, const std::vector<TensorInfo>& state) {
  size_t total = 0;
  for (const TensorInfo& tensor : state) {
    offsets_[tensor.name] = total;
    total += (tensor.nbytes() + kAlignment - 1) / kAlignment * kAlignment;
  }
  memory_ = DeviceBuffer(total == 0 ? kAlignment : total);
  reset(stream);
}

Session::~Session() {
  // What still runs uses the memory that is freed here.
  if (ahead_) cudaEventSynchronize(ahead_->done[ahead_->position & 1].get());
}

void Session::reset(const Stream& stream) {
  // A token that nobody asked for in the end is waited for: its inputs are about to be overwritten.
  if (Calls* calls = std::exchange(ahead_, nullptr)) calls->done[calls->position & 1].synchronize();
  ET_MOE_CUDA(cudaMemsetAsync(memory_.data(), 0, memory_.size(), stream.get()));
}

}  // namespace et_moe::cuda
