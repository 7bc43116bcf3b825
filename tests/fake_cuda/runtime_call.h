// A call of the CUDA runtime, which remembers its last error.
#pragma once

#include <utility>

#include "tests/fake_cuda/state.h"

namespace et_moe::fake_cuda {

/// What cudaGetLastError returns on this thread.
cudaError_t& last_error();

/// See `call`.
template <typename Body>
cudaError_t runtime_call(const char* function, unsigned traits, const Body& body) {
  const cudaError_t error = call(function, traits, body);
  if (error != cudaSuccess) last_error() = error;
  return error;
}

}  // namespace et_moe::fake_cuda
