#include "backends/cuda/runtime/arena.h"

#include <algorithm>
#include <string>

#include "backends/cuda/runtime/alignment.h"

namespace et_moe::cuda {
namespace {

constexpr size_t kChunk = size_t{32} << 20;  // asking CUDA is slow: ask for more than is needed

}  // namespace

Arena::Block Arena::allocate(size_t size) {
  size = aligned(std::max(size, kAlignment));
  auto block = std::find_if(free_.begin(), free_.end(),
                            [size](const auto& entry) { return entry.second >= size; });
  if (block == free_.end()) {
    if (frozen_) {
      throw std::runtime_error(
          "a captured graph would need more scratch memory than the run "
          "before it (" +
          std::to_string(size) + " bytes)");
    }
    try {
      chunks_.emplace_back(std::max(size, kChunk));
    } catch (const CudaError& e) {
      if (e.code() != Error::MemoryAllocationFailed) throw;
      // Compiled code cuts messages: what to do comes first.
      throw DelegateError(e.code(), "too little GPU memory (lower max_sequences, or set " +
                                        std::string("memory_fraction): calls take ") +
                                        std::to_string(std::max(size, kChunk) >> 20) +
                                        " MiB more beside weights and state: " + e.what());
    }
    block = free_.emplace(chunks_.back().data(), chunks_.back().size()).first;
  }
  std::byte* begin = block->first;
  const size_t rest = block->second - size;
  free_.erase(block);
  if (rest > 0) free_.emplace(begin + size, rest);
  used_.emplace(begin, size);
  return {begin, [this](std::byte* p) { release(p); }};
}

void Arena::release(std::byte* begin) {
  const auto used = used_.find(begin);
  auto block = free_.emplace(begin, used->second).first;
  used_.erase(used);
  // Chunks may lie side by side by chance; merging across them is harmless, as they are freed
  // together.
  if (const auto next = std::next(block);
      next != free_.end() && block->first + block->second == next->first) {
    block->second += next->second;
    free_.erase(next);
  }
  if (block != free_.begin()) {
    const auto previous = std::prev(block);
    if (previous->first + previous->second == block->first) {
      previous->second += block->second;
      free_.erase(block);
    }
  }
}

size_t Arena::capacity() const {
  size_t total = 0;
  for (const auto& chunk : chunks_) total += chunk.size();
  return total;
}

}  // namespace et_moe::cuda
