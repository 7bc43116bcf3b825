#include "tests/fake_cuda/errors.h"

#include <stdexcept>

namespace et_moe::fake_cuda {
namespace {

struct Entry {
  int error;
  const char* name;         // the runtime's name
  const char* driver_name;  // the driver's name of the same number
  const char* text;
};

constexpr Entry kErrors[] = {
    {cudaSuccess, "cudaSuccess", "CUDA_SUCCESS", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE",
     "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY",
     "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "CUDA_ERROR_NOT_INITIALIZED",
     "initialization error"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "unrecognized error code",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE",
     "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE",
     "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "CUDA_ERROR_INVALID_IMAGE",
     "device kernel image is invalid"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE",
     "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {cudaErrorSymbolNotFound, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND",
     "named symbol not found"},
    {cudaErrorNotReady, "cudaErrorNotReady", "CUDA_ERROR_NOT_READY", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED",
     "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED",
     "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {cudaErrorUnknown, "cudaErrorUnknown", "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Entry& entry_of(int error) {
  static constexpr Entry kUnknown{-1, "unrecognized error code", "unrecognized error code",
                                  "unrecognized error code"};
  for (const Entry& entry : kErrors) {
    if (entry.error == error) return entry;
  }
  return kUnknown;
}

}  // namespace

const char* error_name(int error) { return entry_of(error).name; }
const char* driver_error_name(int error) { return entry_of(error).driver_name; }
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
