#include "backends/cuda/runtime/container.h"

#include <memory>
#include <stdexcept>
#include <utility>

#include "backends/cuda/runtime/cuda.h"
#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {
namespace {

/// The code for a failed call of the driver, of which compiled code tells the name only.
Error code_of_driver_error(const std::string& text) {
  const auto has = [&text](const char* name) { return text.find(name) != std::string::npos; };
  if (has("CUDA_ERROR_OUT_OF_MEMORY")) return Error::MemoryAllocationFailed;
  if (has("CUDA_ERROR_NO_BINARY_FOR_GPU")) return Error::NotSupported;
  return Error::Internal;
}

/// Tensors as the code takes and gives them.
struct Handles {
  explicit Handles(size_t count) : tensors(count) {}
  ~Handles() {
    for (Tensor* tensor : tensors) delete tensor;
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;

  std::vector<Tensor*> tensors;
};

}  // namespace

Container::Container(const void* data, size_t size, const std::string& name, const Kernels& kernels)
    : name_(name),
      kernels_(kernels),
      code_(data, size, name),
      run_(code_.function<Run>("AOTInductorModelContainerRunSingleThreaded")),
      delete_(code_.function<Delete>("AOTInductorModelContainerDelete")),
      last_error_(code_.function<LastError>("AOTInductorGetLastError")) {
  using Create = int32_t(void**, size_t, const char*, const char*);
  auto* create = code_.function<Create>("AOTInductorModelContainerCreateWithDevice");
  if (create(&handle_, 1, "cuda", nullptr) != 0) fail("the code " + name + " cannot be set up");
}

Container::~Container() { delete_(handle_); }

void Container::fail(const std::string& what) const {
  if (const auto cause = take_error()) {
    throw DelegateError(cause->code(), what + ": " + cause->what());
  }
  const char* text = nullptr;
  std::string message = what;
  if (last_error_(&text) == 0 && text && *text) message += std::string(": ") + text;
  const cudaError_t error = cudaGetLastError();
  if (message.find("CUDA error: ") != std::string::npos && error != cudaSuccess) {
    // The text lacks the name.
    throw DelegateError(error_code(error), message + " (" + cudaGetErrorName(error) + ")");
  }
  throw DelegateError(code_of_driver_error(message), message);
}

std::vector<std::unique_ptr<Tensor>> Container::run(std::vector<std::unique_ptr<Tensor>> inputs,
                                                    size_t count, cudaStream_t stream) const {
  // The code makes null those that it takes over, and gives some outputs, too, if it fails.
  Handles handles(inputs.size()), results(count);
  std::vector<std::unique_ptr<Tensor>> outputs(count);
  for (size_t i = 0; i < inputs.size(); ++i) handles.tensors[i] = inputs[i].release();
  const KernelScope scope(kernels_);
  int32_t status = 0;
  try {
    status = run_(handle_, handles.tensors.data(), inputs.size(), results.tensors.data(), count,
                  stream, nullptr);
  } catch (const std::runtime_error& e) {  // another number of tensors than it takes
    throw DelegateError(Error::InvalidProgram, "the code " + name_ + " failed: " + e.what());
  }
  for (size_t i = 0; i < count; ++i) outputs[i].reset(std::exchange(results.tensors[i], nullptr));
  if (status != 0) fail("the code " + name_ + " failed");
  for (const auto& output : outputs) {
    if (!output) fail("the code " + name_ + " returns fewer than its outputs");
  }
  return outputs;
}

}  // namespace et_moe::cuda
