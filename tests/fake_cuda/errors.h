// Names and texts of CUDA's errors; those of driver and runtime have the same numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace et_moe::fake_cuda {

/// What cudaGetErrorName and cudaGetErrorString return; "unrecognized error code" for an error that
/// is not known here.
const char* error_name(int error);
const char* error_text(int error);
/// What cuGetErrorName returns: the driver has the same numbers, but names of its own.
const char* driver_error_name(int error);

/// The error that has this name; throws std::runtime_error for an unknown name.
cudaError_t error_of(const std::string& name);

/// The error that a function is made to fail with unless a test says otherwise.
cudaError_t default_error(const std::string& function);

/// Whether the context is unusable after this error.
bool ends_context(cudaError_t error);

}  // namespace et_moe::fake_cuda
