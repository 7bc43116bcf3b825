#include "backends/cuda/runtime/errors.h"

#include <new>

namespace et_moe::cuda {

Error error_code(const std::exception& error) {
  if (const auto* own = dynamic_cast<const DelegateError*>(&error)) return own->code();
  if (dynamic_cast<const std::bad_alloc*>(&error)) return Error::MemoryAllocationFailed;
  return Error::Internal;
}

}  // namespace et_moe::cuda
