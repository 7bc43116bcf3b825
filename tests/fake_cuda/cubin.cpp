#include "tests/fake_cuda/cubin.h"

#include <elf.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

namespace et_moe::fake_cuda {
namespace {

constexpr uint16_t kMachine = 190;  // EM_CUDA
constexpr char kInfo[] = ".nv.info.";

// Formats and attributes of .nv.info entries. An entry has a format, an attribute and a 16-bit
// value, or the 16-bit size of a value that follows.
constexpr uint8_t kHasSize = 4;
constexpr uint8_t kParameterInfo =
    0x17;  // followed by: uint32 index, uint16 ordinal, uint16 offset, uint32 flags
constexpr uint8_t kParameterBytes = 0x19;   // its value is the 16-bit one
constexpr uint8_t kRequiredThreads = 0x10;  // followed by three uint32

/// Reads a value from `image`; throws std::runtime_error if it does not lie inside.
template <typename T>
T read(const std::string& image, size_t offset) {
  if (offset > image.size() || image.size() - offset < sizeof(T)) {
    throw std::runtime_error("truncated");
  }
  T value;
  std::memcpy(&value, image.data() + offset, sizeof(T));
  return value;
}

/// The whole file that begins at `image`. Its size follows from its headers, which stand at its
/// end.
std::string whole(const void* image) {
  Elf64_Ehdr header;
  std::memcpy(&header, image, sizeof header);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_machine != kMachine ||
      header.e_shentsize != sizeof(Elf64_Shdr)) {
    throw std::runtime_error("not a cubin");
  }
  const size_t headers = header.e_shoff + size_t{header.e_shnum} * sizeof(Elf64_Shdr);
  const size_t segments = header.e_phoff + size_t{header.e_phnum} * sizeof(Elf64_Phdr);
  return {static_cast<const char*>(image), std::max(headers, segments)};
}

int architecture_of(const Elf64_Ehdr& header) {
  // Later versions moved the architecture by a byte.
  const bool old = header.e_ident[EI_ABIVERSION] < 8;
  return static_cast<int>((old ? header.e_flags : header.e_flags >> 8) & 0xff);
}

Kernel parse_info(const std::string& image, const std::string& name, size_t begin, size_t end) {
  Kernel kernel;
  kernel.name = name;
  std::map<uint16_t, Parameter> parameters;
  for (size_t at = begin; at + 4 <= end;) {
    const auto format = read<uint8_t>(image, at), attribute = read<uint8_t>(image, at + 1);
    const auto value = read<uint16_t>(image, at + 2);
    const size_t payload = at + 4;
    if (attribute == kParameterInfo) {
      const uint32_t size = read<uint32_t>(image, payload + 8) >> 18;
      parameters[read<uint16_t>(image, payload + 4)] = {read<uint16_t>(image, payload + 6), size};
    } else if (attribute == kParameterBytes) {
      kernel.parameter_bytes = value;
    } else if (attribute == kRequiredThreads) {
      for (size_t i = 0; i < 3; ++i) kernel.threads[i] = read<uint32_t>(image, payload + 4 * i);
    }
    at = payload + (format == kHasSize ? value : 0);
  }
  uint32_t used = 0;
  for (const auto& [ordinal, parameter] : parameters) {
    if (ordinal != kernel.parameters.size() || parameter.offset < used || parameter.size == 0) {
      throw std::runtime_error("unexpected parameter information of kernel " + name);
    }
    used = parameter.offset + parameter.size;
    kernel.parameters.push_back(parameter);
  }
  if (used != kernel.parameter_bytes) {
    throw std::runtime_error("the parameters of kernel " + name + " do not add up");
  }
  return kernel;
}

}  // namespace

Cubin::Cubin(const void* start) : image(whole(start)) {
  static std::atomic<uint64_t> last{0};
  id = ++last;
  const auto header = read<Elf64_Ehdr>(image, 0);
  architecture = architecture_of(header);
  const auto section = [&](size_t i) {
    return read<Elf64_Shdr>(image, header.e_shoff + i * sizeof(Elf64_Shdr));
  };
  const Elf64_Shdr names = section(header.e_shstrndx);
  for (size_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr info = section(i);
    const size_t at = names.sh_offset + info.sh_name;
    if (at >= image.size()) throw std::runtime_error("truncated");
    const std::string name = image.c_str() + at;
    if (name.compare(0, sizeof kInfo - 1, kInfo) != 0) continue;
    const std::string kernel = name.substr(sizeof kInfo - 1);
    kernels.emplace(kernel,
                    parse_info(image, kernel, info.sh_offset, info.sh_offset + info.sh_size));
  }
  if (kernels.empty()) throw std::runtime_error("has no kernel");
}

}  // namespace et_moe::fake_cuda
