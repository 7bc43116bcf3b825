// What a kernel's binary says of itself.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace et_moe::fake_cuda {

/// A kernel's parameter: where it lies in the kernel's parameter memory.
struct Parameter {
  uint32_t offset, size;  // bytes
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;     // of all parameters together
  uint32_t threads[3] = {0, 0, 0};  // that a block must have; zeros if any number will do
};

/// A parsed cubin: an ELF file whose sections `.nv.info.KERNEL` hold attributes. The format is not
/// documented; the numbers are those that `cuobjdump -elf` shows (EIATTR_KPARAM_INFO and others).
struct Cubin {
  uint64_t id;  // never used twice in a process
  std::string image;
  int architecture = 0;  // such as 90
  std::map<std::string, Kernel> kernels;

  /// `image` is trusted to hold what its ELF header says, as cuModuleLoadData has to.
  /// Throws std::runtime_error that says what is not as expected.
  explicit Cubin(const void* image);
};

}  // namespace et_moe::fake_cuda
