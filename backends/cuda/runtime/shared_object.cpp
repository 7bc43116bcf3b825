#include "backends/cuda/runtime/shared_object.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {

namespace {

/// A path of the descriptor that this process has not used before. A library may stay loaded after
/// dlclose, for as long as a thread lives that ran it, and dlopen takes it for whatever has its
/// path.
std::string unused_path(int file) {
  static std::atomic<uint64_t> count{0};
  std::string path = "/proc/self";
  // Each number is another way to write the same folder.
  for (uint64_t bits = count++; bits; bits >>= 1) path += bits & 1 ? "/." : "/";
  return path + "/fd/" + std::to_string(file);
}

}  // namespace

SharedObject::SharedObject(const void* data, size_t size, const std::string& name) : name_(name) {
  const int file = memfd_create("et_moe", MFD_CLOEXEC);
  const auto* bytes = static_cast<const char*>(data);
  size_t written = 0;
  while (file >= 0 && written < size) {
    const ssize_t count = write(file, bytes + written, size - written);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    written += static_cast<size_t>(count);
  }
  std::string error;
  if (file < 0 || written < size) {
    error = std::strerror(errno);
  } else {
    handle_ = dlopen(unused_path(file).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) error = dlerror();
  }
  if (file >= 0) close(file);
  if (!handle_) {
    throw DelegateError(Error::InvalidProgram, "the code " + name + " cannot be loaded: " + error);
  }
}

SharedObject::~SharedObject() { dlclose(handle_); }

void* SharedObject::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  if (!address) {
    throw DelegateError(Error::InvalidProgram, "the code " + name_ + " has no function " + name);
  }
  return address;
}

}  // namespace et_moe::cuda
