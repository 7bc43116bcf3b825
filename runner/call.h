// One call of a method of a program: what goes in and what is wanted of what comes out.
#pragma once

#include <executorch/runtime/core/exec_aten/exec_aten.h>

#include <cstdint>
#include <string>
#include <vector>

namespace et_moe {

/// A contiguous tensor in host memory.
struct Input {
  std::string name;
  executorch::aten::ScalarType dtype;
  std::vector<int32_t> shape;
  const void* data;  // owned by the caller, who keeps it until the next call of the method
};

struct Call {
  const std::string& method;
  /// By name, in any order; those that the method does not take are left out.
  const std::vector<Input>& inputs;
  /// Names of the outputs that are wanted in host memory. A device may leave others where they are.
  const std::vector<std::string>& outputs;
  /// The next call is of this method again, with the tokens that this one draws, the positions that
  /// follow and otherwise the same inputs. A device may begin it at once; then it is given that
  /// call next, or is settled.
  bool run_ahead = false;
};

}  // namespace et_moe
