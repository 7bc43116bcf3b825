// CUDA calls that throw, and memory and streams that free themselves.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {

/// The code that ExecuTorch has for an error of CUDA.
Error error_code(cudaError_t error);

/// A CUDA call that failed: its name, CUDA's name of the error and what it means.
class CudaError : public DelegateError {
 public:
  CudaError(const char* call, cudaError_t error);
};

/// Throws CudaError unless `error` is cudaSuccess. Use as ET_MOE_CUDA(cudaMalloc(&p, n)).
void check(cudaError_t error, const char* call);
#define ET_MOE_CUDA(call) ::et_moe::cuda::check((call), #call)

/// Makes the CUDA driver's functions visible to the code of a `.pte`, which does not name the
/// library they are in. Throws DelegateError that says what is missing: the driver or a GPU
/// (NotFound), or a driver new enough for this program (NotSupported).
void open_driver();

/// Compute capability of the current GPU as the exporter writes it, such as "sm_90".
std::string architecture();

/// Memory of the current GPU in bytes.
struct MemoryInfo {
  size_t free = 0, total = 0;
};
MemoryInfo memory_info();

/// Device memory, uninitialised.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t size);
  DeviceBuffer(DeviceBuffer&& other) noexcept;
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Page-locked host memory, which kernels reach, too.
class PinnedBuffer {
 public:
  explicit PinnedBuffer(size_t size);
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();
  std::byte* data() const { return data_; }
  /// Its address in kernels.
  std::byte* device_data() const { return device_data_; }

 private:
  std::byte* data_ = nullptr;
  std::byte* device_data_ = nullptr;
};

/// A stream that does not wait for the default stream.
class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();
  cudaStream_t get() const { return stream_; }
  void synchronize() const;

 private:
  cudaStream_t stream_ = nullptr;
};

/// An event that only orders work.
class Event {
 public:
  Event() { ET_MOE_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }
  void record(const Stream& stream) const { ET_MOE_CUDA(cudaEventRecord(event_, stream.get())); }
  /// Returns at once before the first record.
  void synchronize() const { ET_MOE_CUDA(cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

/// A captured and instantiated graph.
class Graph {
 public:
  /// Captures what `launch` puts on the stream, without running it. If anything fails the capture
  /// is ended and the error rethrown.
  template <typename Launch>
  static Graph capture(const Stream& stream, const Launch& launch) {
    ET_MOE_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
    try {
      launch();
    } catch (...) {
      abandon(stream);
      throw;
    }
    return end(stream);
  }
  Graph(Graph&& other) noexcept;
  Graph& operator=(Graph&&) = delete;
  ~Graph();
  void launch(const Stream& stream) const;

 private:
  Graph() = default;
  static Graph end(const Stream& stream);
  static void abandon(const Stream& stream);
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace et_moe::cuda
