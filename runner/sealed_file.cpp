#include "runner/sealed_file.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>
#include <stdexcept>

namespace et_moe {

void check_kind(const MappedFile& file, const std::string& path, std::string_view identifier,
                const std::string& kind) {
  constexpr size_t kOffset = 4;  // of the identifier, behind that of the root table
  if (file.size() >= kOffset + identifier.size() &&
      std::memcmp(file.data() + kOffset, identifier.data(), identifier.size()) == 0) {
    return;
  }
  throw std::runtime_error(path + ": not " + kind + ", expected one that `et-moe export` wrote");
}

size_t check_seal(const MappedFile& file, const std::string& path) {
  constexpr char kMagic[] = "ETMOESUM";
  const auto damaged = [&path](const char* what) {
    return std::runtime_error(path + ": " + what + "; export it again with `et-moe export`");
  };
  if (file.size() < kTrailerSize) throw damaged("too short for a file of `et-moe export`");
  const uint8_t* trailer = file.data() + file.size() - kTrailerSize;
  if (std::memcmp(trailer, kMagic, 8) != 0) {
    throw damaged("no checksum at its end: truncated, or not written by `et-moe export`");
  }
  uint64_t covered = 0, expected = 0;
  std::memcpy(&covered, trailer + 8, 8);
  std::memcpy(&expected, trailer + 16, 8);
  if (covered == 0 || covered > file.size() - kTrailerSize) {
    throw damaged("damaged: its checksum covers more bytes than it has");
  }
  if (XXH3_64bits(file.data(), covered) != expected) throw damaged("damaged: checksum mismatch");
  return covered;
}

}  // namespace et_moe
