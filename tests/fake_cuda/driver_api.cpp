// The functions of the CUDA driver that compiled code calls: modules and launches.

#include <cuda.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "tests/fake_cuda/state.h"

namespace et_moe::fake_cuda {
namespace {

/// Reads this process's own memory; false where it cannot be read.
bool read_safely(void* to, const void* from, size_t size) {
  iovec local{to, size}, remote{const_cast<void*>(from), size};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(size);
}

/// The arguments that a launch passes; throws std::runtime_error if there are fewer than the kernel
/// has parameters.
std::vector<std::string> read_arguments(const Kernel& kernel, void** arguments) {
  std::vector<std::string> values;
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    void* address = nullptr;
    std::string value(kernel.parameters[i].size, 0);
    if (!read_safely(&address, arguments + i, sizeof address) ||
        !read_safely(value.data(), address, value.size())) {
      throw std::runtime_error("the kernel has " + std::to_string(kernel.parameters.size()) +
                               " parameters, argument " + std::to_string(i) + " cannot be read");
    }
    values.push_back(value);
  }
  return values;
}

std::string size_text(const uint32_t (&size)[3]) {
  return std::to_string(size[0]) + " x " + std::to_string(size[1]) + " x " +
         std::to_string(size[2]);
}

/// What is wrong with the sizes of a launch, or nothing.
std::string check_sizes(const State& s, const Function& function, const Launch& launch) {
  constexpr uint32_t kMostBlocks[] = {0x7fffffff, 0xffff, 0xffff};
  uint64_t threads = 1;
  for (size_t i = 0; i < 3; ++i) {
    if (launch.grid[i] == 0 || launch.grid[i] > kMostBlocks[i]) {
      return "a grid of " + size_text(launch.grid) + " blocks";
    }
    threads *= launch.block[i];
  }
  const bool required = function.kernel->threads[0] != 0;
  if (threads == 0 || threads > 1024 ||
      (required && std::memcmp(launch.block, function.kernel->threads, sizeof launch.block) != 0)) {
    return "blocks of " + size_text(launch.block) + " threads, the kernel was compiled for " +
           size_text(function.kernel->threads);
  }
  if (launch.shared_memory > function.dynamic_shared_memory) {
    return std::to_string(launch.shared_memory) + " bytes of shared memory, allowed are " +
           std::to_string(function.dynamic_shared_memory) + " (the device has " +
           std::to_string(s.config.shared_memory_limit()) + ")";
  }
  return "";
}

/// What is wrong with arguments that are addresses of the device, or nothing.
std::string check_addresses(const State& s, const Launch& launch) {
  for (size_t i = 0; i < launch.arguments.size(); ++i) {
    const void* address = nullptr;
    if (launch.arguments[i].size() != sizeof address) continue;
    std::memcpy(&address, launch.arguments[i].data(), sizeof address);
    if (!s.memory.is_device(address)) continue;  // a number, or no address at all
    const std::string text = s.memory.check_device(address, 1);
    if (!text.empty()) return "argument " + std::to_string(i) + ": " + text;
  }
  return "";
}

/// Draws the token that the environment names, in all of the memory where the host looks for
/// tokens.
void draw(const State& s, const Launch& launch) {
  uintptr_t drawn = 0;
  std::memcpy(&drawn, launch.arguments[2].data(), sizeof drawn);
  const auto [begin, size] = *std::prev(s.memory.allocations().upper_bound(drawn));
  std::byte* memory = s.memory.at(reinterpret_cast<const void*>(begin));
  std::fill_n(reinterpret_cast<int64_t*>(memory), size / sizeof(int64_t), s.config.draw);
}

cudaError_t run_launch(State& s, const Function& function, const Launch& launch) {
  const Kernel& kernel = *function.kernel;
  std::string text = function.loaded ? check_addresses(s, launch) : "its module was unloaded";
  if (!text.empty()) {
    return s.violation(cudaErrorIllegalAddress, "run of kernel " + kernel.name + ": " + text);
  }
  const uint64_t runs = ++s.launches[kernel.name];
  ++s.launched;
  if (s.config.sidecar.empty()) {
    const bool hands_over = kernel.name.find("hand_over") != std::string::npos;
    if (hands_over && s.config.first_draw > 0 && runs >= s.config.first_draw) draw(s, launch);
    return cudaSuccess;
  }
  try {
    if (!s.interpreter) s.interpreter.emplace(s.config.sidecar, s.memory);
    text = s.interpreter->run(*function.module, kernel, launch, s.memory);
  } catch (const std::exception& e) {
    text = e.what();
  }
  if (text.empty()) return cudaSuccess;
  return s.violation(cudaErrorLaunchFailure, "run of kernel " + kernel.name + ": " + text);
}

cudaError_t launch_kernel(State& s, const void* handle, Launch launch, cudaStream_t stream_handle,
                          void** arguments, void** extra) {
  const auto fail = [&s](cudaError_t error, const std::string& text) {
    return s.violation(error, "cuLaunchKernel: " + text);
  };
  const auto found = s.functions.find(handle);
  if (found == s.functions.end())
    return fail(cudaErrorInvalidResourceHandle, "not a live function");
  const std::shared_ptr<Function> function = found->second;
  const std::string& name = function->kernel->name;
  const auto stream = s.stream("cuLaunchKernel", stream_handle);
  if (!stream) return cudaErrorInvalidResourceHandle;
  if (extra) return fail(cudaErrorInvalidValue, name + ": `extra` is not null");
  std::string text = check_sizes(s, *function, launch);
  if (!text.empty()) return fail(cudaErrorInvalidValue, name + ": " + text);
  try {
    launch.arguments = read_arguments(*function->kernel, arguments);
  } catch (const std::exception& e) {
    return fail(cudaErrorInvalidValue, name + ": " + e.what());
  }
  text = check_addresses(s, launch);
  if (!text.empty()) return fail(cudaErrorInvalidValue, name + ": " + text);
  stream->enqueue([&s, function, launch] { return run_launch(s, *function, launch); });
  return cudaSuccess;
}

cudaError_t load_module(State& s, CUmodule* module, const void* image) {
  std::shared_ptr<const Cubin> cubin;
  try {
    cubin = std::make_shared<const Cubin>(image);
  } catch (const std::exception& e) {
    return s.violation(cudaErrorInvalidKernelImage, std::string("cuModuleLoadData: ") + e.what());
  }
  // From 9.0 on, Triton's code uses features of its own architecture, and runs on no other.
  const int device = 10 * s.config.major + s.config.minor, code = cubin->architecture;
  const bool runs = code == device || (code < 90 && code / 10 == device / 10 && code < device);
  if (!runs) return cudaErrorNoKernelImageForDevice;
  s.modules.add(std::move(cubin), module);
  return cudaSuccess;
}

cudaError_t unload_module(State& s, CUmodule handle) {
  const auto module = s.modules.find(handle);
  if (!module) return s.violation(cudaErrorInvalidResourceHandle, "cuModuleUnload: not a module");
  for (auto it = s.functions.begin(); it != s.functions.end();) {
    const bool gone = it->second->module == module;
    if (gone) it->second->loaded = false;  // graphs may still hold it
    it = gone ? s.functions.erase(it) : std::next(it);
  }
  s.modules.remove(handle);
  return cudaSuccess;
}

cudaError_t get_function(State& s, CUfunction* function, CUmodule handle, const char* name) {
  const auto module = s.modules.find(handle);
  if (!module) {
    return s.violation(cudaErrorInvalidResourceHandle, "cuModuleGetFunction: not a module");
  }
  const auto kernel = module->kernels.find(name);
  if (kernel == module->kernels.end()) {
    return s.violation(cudaErrorSymbolNotFound,
                       std::string("cuModuleGetFunction: no kernel is named ") + name);
  }
  last_handle += 16;
  *function = reinterpret_cast<CUfunction>(last_handle);
  s.functions[*function] = std::make_shared<Function>(Function{module, &kernel->second});
  return cudaSuccess;
}

cudaError_t set_attribute(State& s, CUfunction handle, CUfunction_attribute attribute, int value) {
  const auto function = s.functions.find(handle);
  if (function == s.functions.end()) {
    return s.violation(cudaErrorInvalidResourceHandle, "cuFuncSetAttribute: not a live function");
  }
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    return s.violation(cudaErrorNotSupported, "cuFuncSetAttribute: attribute " +
                                                  std::to_string(attribute) + " is not modelled");
  }
  if (value < 0 || static_cast<uint32_t>(value) > s.config.shared_memory_limit()) {
    return s.violation(cudaErrorInvalidValue,
                       "cuFuncSetAttribute: " + function->second->kernel->name + ": " +
                           std::to_string(value) + " bytes of shared memory, the device has " +
                           std::to_string(s.config.shared_memory_limit()));
  }
  function->second->dynamic_shared_memory = static_cast<uint32_t>(value);
  return cudaSuccess;
}

template <typename Body>
CUresult driver_call(const char* name, unsigned traits, const Body& body) {
  return static_cast<CUresult>(call(name, traits, body));
}

}  // namespace
}  // namespace et_moe::fake_cuda

using namespace et_moe::fake_cuda;

extern "C" {

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = driver_error_name(static_cast<int>(error));
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error_text(static_cast<int>(error));
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return driver_call("cuModuleLoadData", kUnsafeInCapture,
                     [&](State& s) { return load_module(s, module, image); });
}

CUresult cuModuleUnload(CUmodule module) {
  return driver_call("cuModuleUnload", kReleases | kUnsafeInCapture, [&](State& s) {
    const cudaError_t error = s.run_all();
    const cudaError_t unloaded = unload_module(s, module);
    return error != cudaSuccess ? error : unloaded;
  });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return driver_call("cuModuleGetFunction", kPlain,
                     [&](State& s) { return get_function(s, function, module, name); });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return driver_call("cuFuncSetAttribute", kPlain,
                     [&](State& s) { return set_attribute(s, function, attribute, value); });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments,
                          void** extra) {
  return driver_call("cuLaunchKernelEx", kPlain, [&](State& s) {
    for (unsigned i = 0; i < config->numAttrs; ++i)
      if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        return s.violation(cudaErrorInvalidValue,
                           "cuLaunchKernelEx: an attribute that is not known");
    const Launch launch{{config->gridDimX, config->gridDimY, config->gridDimZ},
                        {config->blockDimX, config->blockDimY, config->blockDimZ},
                        config->sharedMemBytes,
                        {}};
    return launch_kernel(s, function, launch, config->hStream, arguments, extra);
  });
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z,
                        unsigned shared_memory, CUstream stream, void** arguments, void** extra) {
  const Launch launch{{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_memory, {}};
  return driver_call("cuLaunchKernel", kPlain, [&](State& s) {
    return launch_kernel(s, function, launch, stream, arguments, extra);
  });
}

}  // extern "C"
