#include "runner/device.h"

#include <stdexcept>

#include "runner/cpu_device.h"
#ifdef ET_MOE_HAS_CUDA
#include "runner/cuda_device.h"
#endif

namespace et_moe {

std::unique_ptr<Device> make_device(const std::string& backend,
                                    [[maybe_unused]] const DeviceOptions& options) {
  if (backend == "cpu") return std::make_unique<CpuDevice>();
  if (backend == "cuda") {
#ifdef ET_MOE_HAS_CUDA
    return std::make_unique<CudaDevice>(options.cuda_graph);
#else
    throw std::runtime_error(
        "this is a program for CUDA, and this runner was built without CUDA "
        "(-DET_MOE_CUDA=OFF): build it with, or export with `--backend cpu`");
#endif
  }
  throw std::runtime_error("get_backend is \"" + backend + "\", expected \"cpu\" or \"cuda\"");
}

}  // namespace et_moe
