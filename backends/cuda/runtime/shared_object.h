// Code of a `.pte`: a shared object that is in memory, not in a file.
#pragma once

#include <cstddef>
#include <string>

namespace et_moe::cuda {

/// A shared object in memory, loaded by way of an anonymous file.
class SharedObject {
 public:
  /// Throws DelegateError (InvalidProgram) with `name` and what the loader says.
  SharedObject(const void* data, size_t size, const std::string& name);
  ~SharedObject();
  SharedObject(const SharedObject&) = delete;
  SharedObject& operator=(const SharedObject&) = delete;

  /// A function of C linkage; throws DelegateError (InvalidProgram) if there is none of this name.
  template <typename Function>
  Function* function(const char* name) const {
    return reinterpret_cast<Function*>(symbol(name));
  }

 private:
  void* symbol(const char* name) const;
  void* handle_ = nullptr;
  std::string name_;
};

}  // namespace et_moe::cuda
