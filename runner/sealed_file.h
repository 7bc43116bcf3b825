// Sealed files: a trailer with a hash, so that a damaged file is refused before anything parses it.
//
// The format is that of backends/sealed_file.py, which writes it: the last 24 bytes of a file are
// the magic "ETMOESUM", the number of bytes covered from the start (uint64), and their XXH3 64-bit
// hash (uint64), little-endian.
#pragma once

#include <string>
#include <string_view>

#include "runner/files.h"

namespace et_moe {

constexpr size_t kTrailerSize = 24;

/// Throws std::runtime_error that names `path` unless the file is a flatbuffer with the identifier:
/// what is no such file at all is not to be called a damaged one.
///
/// Args:
///   kind: what was expected, such as "a FlatTensor file (.ptd)".
void check_kind(const MappedFile& file, const std::string& path, std::string_view identifier,
                const std::string& kind);

/// Checks the trailer and the hash of what it covers; returns the number of bytes covered.
/// Throws std::runtime_error that names `path` and says what is wrong.
size_t check_seal(const MappedFile& file, const std::string& path);

}  // namespace et_moe
