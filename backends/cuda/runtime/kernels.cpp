#include "backends/cuda/runtime/kernels.h"

#include <sodium/crypto_hash_sha256.h>

#include <cstdio>
#include <utility>

#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {
namespace {

using executorch::runtime::FreeableBuffer;
using executorch::runtime::NamedDataMap;

thread_local const Kernels* current_kernels = nullptr;

std::string sha256_of(const void* data, size_t size) {
  unsigned char digest[crypto_hash_sha256_BYTES];
  crypto_hash_sha256(digest, static_cast<const unsigned char*>(data), size);
  std::string text;
  for (unsigned char byte : digest) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", byte);
    text += digits;
  }
  return text;
}

}  // namespace

FreeableBuffer load_code(const NamedDataMap& data, const std::string& name,
                         const std::string& sha256) {
  auto blob = data.get_data(name);
  if (!blob.ok()) {
    throw DelegateError(Error::InvalidProgram, "the program lacks the code " + name);
  }
  if (sha256_of(blob->data(), blob->size()) != sha256) {
    throw DelegateError(
        Error::InvalidProgram,
        "the code " + name + " is not what was exported: digest mismatch; it will not be run");
  }
  return std::move(*blob);
}

void Kernels::adopt(const NamedDataMap& data, const std::string& sha256) {
  if (binaries_.count(sha256) == 0) binaries_.emplace(sha256, load_code(data, sha256, sha256));
}

const void* Kernels::find(const std::string& sha256) const {
  const auto found = binaries_.find(sha256);
  return found == binaries_.end() ? nullptr : found->second.data();
}

KernelScope::KernelScope(const Kernels& kernels) : previous_(current_kernels) {
  current_kernels = &kernels;
}
KernelScope::~KernelScope() { current_kernels = previous_; }

}  // namespace et_moe::cuda

/// What compiled code calls before it loads a kernel, see `find_kernels` in
/// backends/cuda/host_program.py. Null, of which the driver makes an error, if there is none.
extern "C" const void* et_moe_find_kernel(const char* sha256) {
  return et_moe::cuda::current_kernels ? et_moe::cuda::current_kernels->find(sha256) : nullptr;
}
