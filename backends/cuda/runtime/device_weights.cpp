#include "backends/cuda/runtime/device_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "backends/threads.h"

namespace et_moe::cuda {
namespace {

using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;

constexpr size_t kPiece = size_t{16} << 20;  // bytes copied at a time
constexpr size_t kThreads = 8;

struct Piece {
  const std::byte* from;
  std::byte* to;
  size_t size;
};

DelegateError misfit(const std::string& text) {
  return DelegateError(Error::InvalidExternalData, text);
}

FreeableBuffer find(const NamedDataMap& data, const TensorSpec& tensor) {
  const auto layout = data.get_tensor_layout(tensor.name);
  if (!layout.ok()) {
    throw misfit("the weights have no tensor " + tensor.name +
                 "; is it the .ptd of another model or backend?");
  }
  const auto sizes = layout->sizes();
  if (!tensor.accepts(layout->scalar_type(), sizes.data(), sizes.size())) {
    throw misfit("the weight " + tensor.name +
                 " has another dtype or shape than the program takes; is it the .ptd of another "
                 "model or prepack version?");
  }
  auto buffer = data.get_data(tensor.name);
  if (!buffer.ok() || buffer->size() != tensor.nbytes()) {
    throw misfit("the weights are truncated at tensor " + tensor.name);
  }
  return std::move(*buffer);
}

/// Copies pieces taken from a shared counter, reading the next while the last is on its way.
void copy_pieces(const std::vector<Piece>& pieces, std::atomic<size_t>& next) {
  const Stream stream;
  const PinnedBuffer pinned(2 * kPiece);
  const Event done[2];
  try {
    size_t turn = 0;
    for (size_t i = next++; i < pieces.size(); i = next++, turn ^= 1) {
      std::byte* half = pinned.data() + turn * kPiece;
      done[turn].synchronize();
      std::memcpy(half, pieces[i].from, pieces[i].size);
      ET_MOE_CUDA(cudaMemcpyAsync(pieces[i].to, half, pieces[i].size, cudaMemcpyHostToDevice,
                                  stream.get()));
      done[turn].record(stream);
    }
    stream.synchronize();
  } catch (...) {
    cudaStreamSynchronize(stream.get());  // copies from the pinned memory must end before it goes
    throw;
  }
}

void copy_all(const std::vector<Piece>& pieces) {
  std::atomic<size_t> next{0};
  int device = 0;
  ET_MOE_CUDA(cudaGetDevice(&device));
  const size_t count = std::min(
      {kThreads, pieces.size(), static_cast<size_t>(std::thread::hardware_concurrency()) + 1});
  run_in_threads(count, [&] {
    try {
      ET_MOE_CUDA(cudaSetDevice(device));
      copy_pieces(pieces, next);
    } catch (...) {
      next = pieces.size();  // for the other threads
      throw;
    }
  });
}

}  // namespace

DeviceWeights::DeviceWeights(const NamedDataMap& data, const std::vector<TensorSpec>& tensors) {
  std::vector<FreeableBuffer> sources;
  const std::vector<size_t> offsets = aligned_offsets(tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    sources.push_back(find(data, tensors[i]));
    offsets_[tensors[i].name] = offsets[i];
  }
  const size_t total = offsets.back();
  const MemoryInfo memory = memory_info();
  if (total > memory.free) {
    throw DelegateError(Error::MemoryAllocationFailed,
                        "too little GPU memory: the weights need " + std::to_string(total >> 20) +
                            " MiB, " + std::to_string(memory.free >> 20) + " of " +
                            std::to_string(memory.total >> 20) + " MiB are free");
  }
  if (total == 0) return;
  memory_ = DeviceBuffer(total);
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto* from = static_cast<const std::byte*>(sources[i].data());
    for (size_t begin = 0; begin < sources[i].size(); begin += kPiece) {
      pieces.push_back(
          {from + begin, at(tensors[i].name) + begin, std::min(kPiece, sources[i].size() - begin)});
    }
  }
  copy_all(pieces);
}

}  // namespace et_moe::cuda
