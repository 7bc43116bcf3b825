#include "tests/fake_cuda/errors.h"

#include <stdexcept>

namespace et_moe::fake_cuda {
namespace {

struct Entry {
  int error;
  const char* name;
  const char* text;
};

constexpr Entry kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "named symbol not found"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const Entry& entry_of(int error) {
  static constexpr Entry kUnknown{-1, "unrecognized error code", "unrecognized error code"};
  for (const Entry& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  return kUnknown;
}

}  // namespace

const char* error_name(int error) { return entry_of(error).name; }
const char* error_text(int error) { return entry_of(error).text; }

cudaError_t error_of(const std::string& name) {
  for (const Entry& entry : kErrors) {
    if (entry.name == name) return static_cast<cudaError_t>(entry.error);
  }
  throw std::runtime_error("ET_MOE_FAKE_CUDA_ERROR: no error is named " + name);
}

cudaError_t default_error(const std::string& function) {
  if (function.find("Alloc") != std::string::npos || function == "cudaMalloc") {
    return cudaErrorMemoryAllocation;
  }
  if (function.find("Launch") != std::string::npos) return cudaErrorLaunchOutOfResources;
  if (function == "cuModuleLoadData") return cudaErrorNoKernelImageForDevice;
  return cudaErrorUnknown;
}

bool ends_context(cudaError_t error) {
  return error == cudaErrorIllegalAddress || error == cudaErrorLaunchFailure;
}

}  // namespace et_moe::fake_cuda
