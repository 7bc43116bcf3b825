#include "tests/fake_cuda/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace et_moe::fake_cuda {
namespace {

constexpr size_t kPage =
    4096;  // allocations start on a page, so that a freed one can be given back

/// The allocation that `address` lies in, or the end.
std::map<uintptr_t, size_t>::const_iterator find(const std::map<uintptr_t, size_t>& allocations,
                                                 const void* address) {
  const auto value = reinterpret_cast<uintptr_t>(address);
  auto next = allocations.upper_bound(value);
  if (next == allocations.begin()) return allocations.end();
  --next;
  return value - next->first < next->second ? next : allocations.end();
}

std::string check(const std::map<uintptr_t, size_t>& allocations, const void* address, size_t size,
                  const char* what) {
  const auto found = find(allocations, address);
  if (found == allocations.end()) return std::string("not a live address of ") + what;
  const size_t left = found->first + found->second - reinterpret_cast<uintptr_t>(address);
  if (size <= left) return "";
  return std::to_string(size) + " bytes, " + std::to_string(left) + " are left of " +
         std::to_string(found->second) + " bytes of " + what;
}

}  // namespace

Memory::Memory(uint8_t filling) : filling_(filling), file_(memfd_create("fake_cuda", 0)) {
  void* device = MAP_FAILED;
  void* alias = MAP_FAILED;
  if (file_ >= 0 && ftruncate(file_, kSize) == 0) {
    device = mmap(reinterpret_cast<void*>(kBase), kSize, PROT_NONE,
                  MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, file_, 0);
    alias = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
  }
  if (device != reinterpret_cast<void*>(kBase) || alias == MAP_FAILED) {
    throw std::runtime_error("the addresses of device memory cannot be reserved");
  }
  alias_ = static_cast<std::byte*>(alias);
}

void* Memory::allocate(size_t size) {
  if (size == 0) return nullptr;
  const size_t begin = next_;
  next_ += (size + 2 * kPage - 1) / kPage * kPage;  // at least a byte lies between two allocations
  used_ += size;
  device_.emplace(kBase + begin, size);
  if (filling_ != 0) std::memset(alias_ + begin, filling_, size);
  return reinterpret_cast<void*>(kBase + begin);
}

bool Memory::free(void* address) {
  if (!address) return true;
  const auto found = device_.find(reinterpret_cast<uintptr_t>(address));
  if (found == device_.end()) return false;
  fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(found->first - kBase), static_cast<off_t>(found->second));
  used_ -= found->second;
  device_.erase(found);
  return true;
}

void* Memory::allocate_pinned(size_t size) {
  void* device = allocate(size);
  if (!device) return nullptr;
  used_ -= size;
  std::byte* address = at(device);
  pinned_.emplace(reinterpret_cast<uintptr_t>(address), size);
  return address;
}

bool Memory::free_pinned(void* address) {
  if (!address) return true;
  const auto found = pinned_.find(reinterpret_cast<uintptr_t>(address));
  if (found == pinned_.end()) return false;
  used_ += found->second;
  free(device_address(address));
  pinned_.erase(found);
  return true;
}

void* Memory::device_address(const void* pinned) const {
  if (!is_pinned(pinned)) return nullptr;
  return reinterpret_cast<void*>(kBase + (static_cast<const std::byte*>(pinned) - alias_));
}

bool Memory::is_device(const void* address) const {
  return reinterpret_cast<uintptr_t>(address) - kBase < kSize;
}

std::string Memory::check_device(const void* address, size_t size) const {
  return check(device_, address, size, "device memory");
}

std::string Memory::check_host(const void* address, size_t size) const {
  if (!address) return "a null pointer";
  if (is_device(address)) return "device memory, expected host memory";
  return is_pinned(address) ? check(pinned_, address, size, "page-locked memory") : "";
}

std::string Memory::check_copy(const void* to, const void* from, size_t size,
                               cudaMemcpyKind kind) const {
  if (size == 0) return "";
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  std::string text = to_device ? check_device(to, size) : check_host(to, size);
  if (!text.empty()) return "the target: " + text;
  text = from_device ? check_device(from, size) : check_host(from, size);
  return text.empty() ? "" : "the source: " + text;
}

bool Memory::is_pinned(const void* address) const {
  return find(pinned_, address) != pinned_.end();
}

std::byte* Memory::at(const void* address) const {
  if (is_device(address)) return alias_ + (reinterpret_cast<uintptr_t>(address) - kBase);
  return static_cast<std::byte*>(const_cast<void*>(address));
}

}  // namespace et_moe::fake_cuda
