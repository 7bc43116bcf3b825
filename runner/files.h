// Files: read whole, mapped, or written so that a failure leaves nothing under the final name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace et_moe {

/// The file that `path` leads to: the end of a chain of links, which need not exist.
std::string follow_links(const std::string& path);

/// The content of a file. Throws std::runtime_error that names it.
std::string read_file(const std::string& path);

/// A file that is being written. It is a temporary file beside `path`, which becomes `path` on
/// `close`; a destructor that comes before removes it. A symbolic link is followed and its target
/// replaced; the owner, the group and the permissions of a file that is replaced stay as far as the
/// process may set them. What is no regular file (a FIFO, a device) is written to directly, and so
/// are a file that is a mount point, which cannot be replaced, and the file that standard output or
/// standard error already goes to.
/// `backends/atomic_file.py` does the same for the pipeline's outputs. A signal that
/// `handle_ending_signals` handles removes the temporary file, too.
///
/// All functions throw std::runtime_error that names `path`.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(const void* data, size_t size);
  void close();

 private:
  void check(bool success) const;
  void discard();

  std::string path_, target_, temporary_;  // no temporary: the file is written to directly
  int fd_ = -1;
};

/// Throws as an `OutputFile` for `path` would, and leaves nothing: for what is written at the end
/// of long work. What is written to directly is not opened, since a FIFO would wait for its reader.
/// Temporary files that a killed process left there are removed.
void check_writable(const std::string& path);

/// Writes a whole `OutputFile`.
void write_file(const std::string& path, std::string_view content);

/// A JSON list of token ids, such as [1, 2, 3], read as it comes: all that is held of it is the
/// ids. Throws std::runtime_error that names the file and the entry at fault.
std::vector<int64_t> read_ids(const std::string& path);

/// Texts as token ids: windows, or a single one that is no list of lists.
struct Windows {
  std::vector<std::vector<int64_t>> ids;
  bool is_list = false;
};

/// A JSON list of token ids, or a list of such lists, read like `read_ids`.
Windows read_windows(const std::string& path);

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

  void write_row(const float* row);
  void close() { file_.close(); }

 private:
  OutputFile file_;
  size_t columns_;
};

}  // namespace et_moe
