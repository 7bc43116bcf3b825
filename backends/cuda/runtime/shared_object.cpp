#include "backends/cuda/runtime/shared_object.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "backends/cuda/runtime/errors.h"

namespace et_moe::cuda {

SharedObject::SharedObject(const void* data, size_t size, const std::string& name)
    : file_(memfd_create("et_moe", MFD_CLOEXEC)), name_(name) {
  const auto* bytes = static_cast<const char*>(data);
  size_t written = 0;
  while (file_ >= 0 && written < size) {
    const ssize_t count = write(file_, bytes + written, size - written);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    written += static_cast<size_t>(count);
  }
  std::string error;
  if (file_ < 0 || written < size) {
    error = std::strerror(errno);
  } else {
    const std::string path = "/proc/self/fd/" + std::to_string(file_);
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle_) error = dlerror();
  }
  if (!handle_) {
    if (file_ >= 0) close(file_);
    throw DelegateError(Error::InvalidProgram, "the code " + name + " cannot be loaded: " + error);
  }
}

SharedObject::~SharedObject() {
  dlclose(handle_);
  close(file_);
}

void* SharedObject::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  if (!address) {
    throw DelegateError(Error::InvalidProgram, "the code " + name_ + " has no function " + name);
  }
  return address;
}

}  // namespace et_moe::cuda
