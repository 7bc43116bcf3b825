// The CUDA runtime's functions for devices, errors and memory.

#include <cstring>
#include <stdexcept>

#include "tests/fake_cuda/runtime_call.h"

namespace et_moe::fake_cuda {

cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

namespace {

cudaMemcpyKind resolve(const State& s, const void* to, const void* from, cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDefault) return kind;
  const bool to_device = s.memory.is_device(to), from_device = s.memory.is_device(from);
  if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
  return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

cudaError_t copy_now(State& s, const char* function, void* to, const void* from, size_t size,
                     cudaMemcpyKind kind) {
  const std::string text = s.memory.check_copy(to, from, size, kind);
  if (!text.empty()) return s.violation(cudaErrorInvalidValue, function + (": " + text));
  if (size > 0) std::memmove(s.memory.at(to), s.memory.at(from), size);
  return cudaSuccess;
}

cudaError_t copy_later(State& s, void* to, const void* from, size_t size, cudaMemcpyKind given,
                       cudaStream_t handle) {
  static constexpr char kName[] = "cudaMemcpyAsync";
  const cudaMemcpyKind kind = resolve(s, to, from, given);
  const auto stream = s.stream(kName, handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  const std::string text = s.memory.check_copy(to, from, size, kind);
  if (!text.empty()) return s.violation(cudaErrorInvalidValue, kName + (": " + text));
  const bool from_host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost;
  if (from_host && !stream->capture && !s.memory.is_pinned(from)) {
    // CUDA copies pageable memory to a buffer of its own before it returns.
    const std::string staged(static_cast<const char*>(from), size);
    stream->enqueue([&s, to, staged, kind] {
      return copy_now(s, kName, to, staged.data(), staged.size(), kind);
    });
    return cudaSuccess;
  }
  const bool pinned_from = s.memory.is_pinned(from), pinned_to = s.memory.is_pinned(to);
  stream->enqueue([&s, to, from, size, kind, pinned_from, pinned_to] {
    if (pinned_from != s.memory.is_pinned(from) || pinned_to != s.memory.is_pinned(to)) {
      return s.violation(cudaErrorIllegalAddress,
                         std::string(kName) + ": its page-locked memory was freed before it ran");
    }
    return copy_now(s, kName, to, from, size, kind);
  });
  const bool waits = kind == cudaMemcpyDeviceToHost && !pinned_to && !stream->capture;
  return waits ? stream->run() : cudaSuccess;
}

cudaError_t set_later(State& s, const char* function, void* to, int value, size_t size,
                      cudaStream_t handle) {
  const auto stream = s.stream(function, handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  const auto check = [&s, function, to, size] {
    const std::string text = size > 0 ? s.memory.check_device(to, size) : "";
    return text.empty() ? cudaSuccess
                        : s.violation(cudaErrorInvalidValue, function + (": " + text));
  };
  const cudaError_t error = check();
  if (error != cudaSuccess) return error;
  stream->enqueue([&s, check, to, value, size] {
    const cudaError_t changed = check();
    if (changed == cudaSuccess && size > 0) std::memset(s.memory.at(to), value, size);
    return changed;
  });
  return cudaSuccess;
}

/// CUDA waits for all work before it gives memory back.
template <typename Free>
cudaError_t free_memory(State& s, const char* function, const Free& free) {
  const cudaError_t error = s.run_all();
  if (!free()) {
    return s.violation(cudaErrorInvalidValue,
                       std::string(function) + ": not the start of live memory");
  }
  return error;
}

cudaError_t attribute(State& s, int* value, cudaDeviceAttr name) {
  switch (name) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = s.config.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = s.config.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(s.config.shared_memory_limit());
      return cudaSuccess;
    default:
      return s.violation(cudaErrorNotSupported, "cudaDeviceGetAttribute: attribute " +
                                                    std::to_string(name) + " is not modelled");
  }
}

cudaError_t check_device_number(State& s, const char* function, int device) {
  if (device >= 0 && device < s.config.devices) return cudaSuccess;
  return s.violation(cudaErrorInvalidDevice,
                     std::string(function) + ": there is no device " + std::to_string(device));
}

}  // namespace
}  // namespace et_moe::fake_cuda

using namespace et_moe::fake_cuda;

extern "C" {

const char* cudaGetErrorName(cudaError_t error) { return error_name(error); }
const char* cudaGetErrorString(cudaError_t error) { return error_text(error); }
cudaError_t cudaPeekAtLastError() { return last_error(); }
cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }

cudaError_t cudaDriverGetVersion(int* version) {
  return runtime_call("cudaDriverGetVersion", kPlain, [&](State& s) {
    *version = s.config.driver_version;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceCount(int* count) {
  return runtime_call("cudaGetDeviceCount", kPlain, [&](State& s) {
    *count = s.config.devices;
    return s.config.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t cudaGetDevice(int* device) {
  return runtime_call("cudaGetDevice", kPlain, [&](State& s) {
    *device = 0;
    return s.config.devices > 0 ? cudaSuccess : cudaErrorNoDevice;
  });
}

cudaError_t cudaSetDevice(int device) {
  return runtime_call("cudaSetDevice", kPlain, [&](State& s) {
    const cudaError_t error = check_device_number(s, "cudaSetDevice", device);
    if (error != cudaSuccess || device == 0) return error;
    return s.violation(cudaErrorNotSupported, "cudaSetDevice: a second device is not modelled");
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  return runtime_call("cudaDeviceGetAttribute", kPlain, [&](State& s) {
    const cudaError_t error = check_device_number(s, "cudaDeviceGetAttribute", device);
    return error != cudaSuccess ? error : attribute(s, value, name);
  });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return runtime_call("cudaMemGetInfo", kPlain, [&](State& s) {
    *total = s.config.memory;
    *free = s.config.memory - s.memory.used();
    return cudaSuccess;
  });
}

cudaError_t cudaMalloc(void** address, size_t size) {
  return runtime_call("cudaMalloc", kUnsafeInCapture, [&](State& s) {
    if (size > s.config.memory - s.memory.used()) return cudaErrorMemoryAllocation;
    *address = s.memory.allocate(size);
    return cudaSuccess;
  });
}

cudaError_t cudaFree(void* address) {
  return runtime_call("cudaFree", kReleases | kUnsafeInCapture, [&](State& s) {
    return free_memory(s, "cudaFree", [&] { return s.memory.free(address); });
  });
}

cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  return runtime_call("cudaHostAlloc", kUnsafeInCapture, [&](State& s) {
    *address = s.memory.allocate_pinned(size);
    return *address || size == 0 ? cudaSuccess : cudaErrorMemoryAllocation;
  });
}

cudaError_t cudaHostGetDevicePointer(void** device, void* address, unsigned) {
  return runtime_call("cudaHostGetDevicePointer", kPlain, [&](State& s) {
    *device = s.memory.device_address(address);
    if (*device) return cudaSuccess;
    return s.violation(cudaErrorInvalidValue, "cudaHostGetDevicePointer: not page-locked memory");
  });
}

cudaError_t cudaFreeHost(void* address) {
  return runtime_call("cudaFreeHost", kReleases | kUnsafeInCapture, [&](State& s) {
    return free_memory(s, "cudaFreeHost", [&] { return s.memory.free_pinned(address); });
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  return runtime_call("cudaMemcpy", kUnsafeInCapture, [&](State& s) {
    const cudaError_t error = s.default_stream->run();
    const cudaError_t copied =
        copy_now(s, "cudaMemcpy", to, from, size, resolve(s, to, from, kind));
    return error != cudaSuccess ? error : copied;
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return runtime_call("cudaMemcpyAsync", kPlain,
                      [&](State& s) { return copy_later(s, to, from, size, kind, stream); });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return runtime_call("cudaMemcpy2DAsync", kPlain, [&](State& s) {
    if (width > to_pitch || width > from_pitch || std::max(to_pitch, from_pitch) > INT32_MAX) {
      return s.violation(cudaErrorInvalidValue, "cudaMemcpy2DAsync: not a pitch of such rows");
    }
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && error == cudaSuccess; ++row) {
      error = copy_later(s, static_cast<char*>(to) + row * to_pitch,
                         static_cast<const char*>(from) + row * from_pitch, width, kind, stream);
    }
    return error;
  });
}

cudaError_t cudaMemset(void* to, int value, size_t size) {
  return runtime_call("cudaMemset", kUnsafeInCapture, [&](State& s) {
    return set_later(s, "cudaMemset", to, value, size, nullptr);
  });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return runtime_call("cudaMemsetAsync", kPlain, [&](State& s) {
    return set_later(s, "cudaMemsetAsync", to, value, size, stream);
  });
}

cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
  return runtime_call("cudaMemset2DAsync", kPlain, [&](State& s) {
    if (width > pitch || pitch > INT32_MAX) {
      return s.violation(cudaErrorInvalidValue, "cudaMemset2DAsync: not a pitch of such rows");
    }
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && error == cudaSuccess; ++row) {
      void* start = static_cast<char*>(to) + row * pitch;
      error = set_later(s, "cudaMemset2DAsync", start, value, width, stream);
    }
    return error;
  });
}

}  // extern "C"
