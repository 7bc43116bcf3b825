#pragma once

#include <cstddef>

namespace et_moe::cuda {

/// Bytes that every tensor on the GPU is aligned to: ALIGNMENT of backends/cuda/backend.py.
constexpr size_t kAlignment = 256;

/// The least multiple of kAlignment that is not below `size`.
constexpr size_t aligned(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace et_moe::cuda
