// Executes launches: a Python process that shares device memory and runs each kernel's own source.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "tests/fake_cuda/cubin.h"
#include "tests/fake_cuda/memory.h"

namespace et_moe::fake_cuda {

struct Launch {
  uint32_t grid[3], block[3], shared_memory;
  std::vector<std::string> arguments;  // the bytes of each, in the order of the kernel's parameters
};

class Interpreter {
 public:
  /// Starts the process. `sidecar` is the path of what `et-moe export` writes for debuggers.
  /// Throws std::runtime_error.
  Interpreter(const std::string& sidecar, const Memory& memory);
  ~Interpreter();
  Interpreter(const Interpreter&) = delete;
  Interpreter& operator=(const Interpreter&) = delete;

  /// Runs one launch to its end; returns what went wrong, or nothing.
  std::string run(const Cubin& module, const Kernel& kernel, const Launch& launch,
                  const Memory& memory);

 private:
  std::string request(const std::string& line);

  pid_t process_ = -1;
  int socket_ = -1;
  std::set<uint64_t> sent_;  // the modules that the process has been sent
};

}  // namespace et_moe::fake_cuda
