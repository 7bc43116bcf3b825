// ExecuTorch's log, as the text of our errors.
#pragma once

#include <string>

namespace et_moe {

/// From now on ExecuTorch's log goes nowhere but to `take_log` and `AbortsThrow`, and the message
/// of a process that ends to stderr.
void capture_log();

/// The first error that ExecuTorch or a kernel logged since the last call, which is the one nearest
/// to its cause, as " (text)"; empty if there was none.
std::string take_log();

/// As long as it lives, a check of ExecuTorch that fails on this thread, such as of a kernel's
/// arguments, throws std::runtime_error with its message instead of ending the process: the values
/// are a file's. What was allocated between is lost; nobody goes on with such a file.
class AbortsThrow {
 public:
  AbortsThrow();
  ~AbortsThrow();
  AbortsThrow(const AbortsThrow&) = delete;
  AbortsThrow& operator=(const AbortsThrow&) = delete;
};

}  // namespace et_moe
