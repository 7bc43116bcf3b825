// Files: read whole, mapped, or written so that a failure leaves nothing under the final name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe {

/// The content of a file. Throws std::runtime_error that names it.
std::string read_file(const std::string& path);

/// Writes a temporary file beside `path`, then renames it. Throws std::runtime_error.
void write_file(const std::string& path, std::string_view content);

/// A JSON list of token ids, such as [1, 2, 3]. Throws std::runtime_error that names the file and
/// the entry at fault.
std::vector<int64_t> read_ids(const std::string& path);

/// A file mapped read-only.
class MappedFile {
 public:
  /// Throws std::runtime_error if `path` cannot be opened or mapped or is empty.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes rows of float32 as a NumPy file (format 1.0, shape [rows, columns], C order) row by row;
/// the file appears under its name on `close`.
class NpyWriter {
 public:
  NpyWriter(const std::string& path, size_t rows, size_t columns);
  ~NpyWriter();
  NpyWriter(const NpyWriter&) = delete;
  NpyWriter& operator=(const NpyWriter&) = delete;

  void write_row(const float* row);
  void close();

 private:
  void write(const void* data, size_t size);
  void discard();

  std::string path_, temporary_;
  size_t columns_;
  int fd_ = -1;
};

}  // namespace et_moe
