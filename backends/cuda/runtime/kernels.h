// Machine code of a program: named blobs, each checked by its digest before it is used.
#pragma once

#include <executorch/runtime/core/named_data_map.h>

#include <map>
#include <string>

namespace et_moe::cuda {

/// The code that a program has under a name. Throws DelegateError (InvalidProgram) if there is
/// none, or if its SHA-256 is not this one.
executorch::runtime::FreeableBuffer load_code(const executorch::runtime::NamedDataMap& data,
                                              const std::string& name, const std::string& sha256);

/// Binaries of kernels by their SHA-256, in hexadecimal: each one once, whoever launches it.
class Kernels {
 public:
  /// Takes over a kernel of a program, if it is not there yet. Throws like `load_code`.
  void adopt(const executorch::runtime::NamedDataMap& data, const std::string& sha256);

  /// Null if there is no such kernel.
  const void* find(const std::string& sha256) const;

 private:
  std::map<std::string, executorch::runtime::FreeableBuffer> binaries_;
};

/// While this lives, compiled code on this thread finds its kernels in `kernels`.
class KernelScope {
 public:
  explicit KernelScope(const Kernels& kernels);
  ~KernelScope();
  KernelScope(const KernelScope&) = delete;
  KernelScope& operator=(const KernelScope&) = delete;

 private:
  const Kernels* previous_;
};

}  // namespace et_moe::cuda
