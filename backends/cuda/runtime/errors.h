// Errors of the delegate, with the codes that ExecuTorch's API returns for them.
#pragma once

#include <executorch/runtime/core/error.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace et_moe::cuda {

using executorch::runtime::Error;

/// An error that has a code of its own; any other exception is `Error::Internal`.
class DelegateError : public std::runtime_error {
 public:
  DelegateError(Error code, const std::string& text) : std::runtime_error(text), code_(code) {}
  Error code() const { return code_; }

 private:
  Error code_;
};

/// The code for an exception. Out of memory, on the host too, is `MemoryAllocationFailed`.
Error error_code(const std::exception& error);

}  // namespace et_moe::cuda
