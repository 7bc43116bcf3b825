#include "backends/cuda/runtime/cuda.h"

#include <dlfcn.h>

#include <utility>

namespace et_moe::cuda {
namespace {

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

Error error_code(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return Error::Ok;
    case cudaErrorMemoryAllocation:
      return Error::MemoryAllocationFailed;
    case cudaErrorNoDevice:
      return Error::NotFound;
    case cudaErrorInsufficientDriver:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorNotSupported:
      return Error::NotSupported;
    default:
      return Error::Internal;
  }
}

CudaError::CudaError(const char* call, cudaError_t error)
    : DelegateError(error_code(error), std::string(call) + ": " + cudaGetErrorName(error) + " (" +
                                           cudaGetErrorString(error) + ")") {}

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed call must not make the next check fail
  throw CudaError(call, error);
}

void open_driver() {
  // The handle is kept: code that uses the driver stays loaded as long as the process lives.
  static void* driver = nullptr;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (!driver) {
    throw DelegateError(
        Error::NotFound,
        std::string("this is a program for CUDA, and there is no NVIDIA driver here: ") +
            dlerror() + "; install one, or export with `--backend cpu`");
  }
  int have = 0;
  ET_MOE_CUDA(cudaDriverGetVersion(&have));
  // Any driver of the runtime's major version will do (CUDA's minor version compatibility).
  if (have / 1000 < CUDART_VERSION / 1000) {
    throw DelegateError(Error::NotSupported, "the NVIDIA driver supports CUDA " + version(have) +
                                                 ", this program needs " +
                                                 version(CUDART_VERSION / 1000 * 1000) +
                                                 " or newer: update the driver");
  }
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorNoDevice) {
    cudaGetLastError();
    throw DelegateError(Error::NotFound,
                        "there is an NVIDIA driver but no GPU (cudaErrorNoDevice)");
  }
  check(error, "cudaGetDeviceCount");
}

std::string architecture() {
  int device = 0, major = 0, minor = 0;
  ET_MOE_CUDA(cudaGetDevice(&device));
  ET_MOE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ET_MOE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return "sm_" + std::to_string(major) + std::to_string(minor);
}

MemoryInfo memory_info() {
  MemoryInfo info;
  ET_MOE_CUDA(cudaMemGetInfo(&info.free, &info.total));
  return info;
}

DeviceBuffer::DeviceBuffer(size_t size) : size_(size) {
  ET_MOE_CUDA(cudaMalloc(reinterpret_cast<void**>(&data_), size));
}

DeviceBuffer::DeviceBuffer(DeviceBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

DeviceBuffer& DeviceBuffer::operator=(DeviceBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

DeviceBuffer::~DeviceBuffer() {
  if (data_) cudaFree(data_);
}

PinnedBuffer::PinnedBuffer(size_t size) {
  ET_MOE_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&data_), size, cudaHostAllocMapped));
  const cudaError_t error =
      cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_data_), data_, 0);
  if (error != cudaSuccess) cudaFreeHost(data_);
  check(error, "cudaHostGetDevicePointer");
}

PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }

Stream::Stream() { ET_MOE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

Stream::~Stream() { cudaStreamDestroy(stream_); }

void Stream::synchronize() const { ET_MOE_CUDA(cudaStreamSynchronize(stream_)); }

Graph Graph::end(const Stream& stream) {
  cudaGraph_t captured = nullptr;
  ET_MOE_CUDA(cudaStreamEndCapture(stream.get(), &captured));
  Graph graph;
  const cudaError_t error = cudaGraphInstantiate(&graph.exec_, captured, 0);
  cudaGraphDestroy(captured);
  check(error, "cudaGraphInstantiate");
  return graph;
}

void Graph::abandon(const Stream& stream) {
  cudaGraph_t captured = nullptr;
  cudaStreamEndCapture(stream.get(), &captured);
  if (captured) cudaGraphDestroy(captured);
  cudaGetLastError();
}

Graph::Graph(Graph&& other) noexcept : exec_(std::exchange(other.exec_, nullptr)) {}

Graph::~Graph() {
  if (exec_) cudaGraphExecDestroy(exec_);
}

void Graph::launch(const Stream& stream) const {
  ET_MOE_CUDA(cudaGraphLaunch(exec_, stream.get()));
}

}  // namespace et_moe::cuda
