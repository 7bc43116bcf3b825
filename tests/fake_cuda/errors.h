// Names and texts of CUDA's errors; those of driver and runtime have the same numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace et_moe::fake_cuda {

/// As cudaGetErrorName and cudaGetErrorString; "unrecognized error code" for one not known here.
const char* error_name(int error);
const char* error_text(int error);
/// As cuGetErrorName: the driver has the same numbers and names of its own.
const char* driver_error_name(int error);

/// The error of a name; throws std::runtime_error for an unknown one.
cudaError_t error_of(const std::string& name);

/// What a function is made to fail with unless a test says otherwise.
cudaError_t default_error(const std::string& function);

/// Whether the context is unusable afterwards.
bool ends_context(cudaError_t error);

}  // namespace et_moe::fake_cuda
