// Device and page-locked memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace et_moe::fake_cuda {

class Memory {
 public:
  /// Reserves addresses. New memory is filled with `filling`.
  /// Throws std::runtime_error if the addresses are taken.
  explicit Memory(uint8_t filling);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /// A fresh address; null for 0 bytes.
  void* allocate(size_t size);
  /// False for an address that is not the start of a live allocation.
  bool free(void* address);
  /// Host memory, and what kernels know it as.
  void* allocate_pinned(size_t size);
  bool free_pinned(void* address);
  /// Null for an address that is not in live page-locked memory.
  void* device_address(const void* pinned) const;
  size_t used() const { return used_; }

  bool is_device(const void* address) const;
  /// What is wrong with `size` bytes of device memory at `address`, or nothing.
  std::string check_device(const void* address, size_t size) const;
  /// What is wrong with a copy, or nothing. `kind` is not cudaMemcpyDefault.
  std::string check_copy(const void* to, const void* from, size_t size, cudaMemcpyKind kind) const;
  bool is_pinned(const void* address) const;
  /// Where the fake itself reads and writes the memory that the program knows as `address`.
  std::byte* at(const void* address) const;

  /// The live allocations, as address -> bytes, of device memory and of page-locked memory.
  const std::map<uintptr_t, size_t>& allocations() const { return device_; }
  const std::map<uintptr_t, size_t>& pinned() const { return pinned_; }

  /// A process that executes kernels maps all of the file at this address, which is far from those
  /// that Linux hands out.
  static constexpr uintptr_t kBase = uintptr_t{1} << 45;
  static constexpr size_t kSize = size_t{1} << 40;
  int file() const { return file_; }

 private:
  std::string check_host(const void* address, size_t size) const;

  const uint8_t filling_;
  int file_ = -1;
  std::byte* alias_ = nullptr;  // all of the file, readable and writable
  size_t next_ = 0;
  size_t used_ = 0;
  std::map<uintptr_t, size_t> device_, pinned_;
};

}  // namespace et_moe::fake_cuda
